"""README.md and docs/: commands have valid configurations; paths, tests, make targets and links exist."""

import importlib.util
import re
import shlex
from dataclasses import replace

import pytest

import app.main
import evals.main
from app.study.options import Options as Study
from app.zoo.__main__ import Options as Zoo
from tests.docs import pages
from tests.docs.pages import DOCS, PAGES, ROOT, commands
from tools.gallery import __main__ as gallery
from tubelet import config
from tubelet.report import __main__ as report
from tubelet.runtime import launch
from tubelet.slurm import command_line

PROGRAMS = {"app": app.main.PROGRAMS, "evals": evals.main.PROGRAMS}
STUDIES = {"app.study": Study, "app.zoo": Zoo}
GENERATED = ("build/", "docs/reference/")


@pytest.mark.parametrize(("page", "command"), commands(r"python -m (app|evals)\.main "))
def test_programs(page, command, checkout, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "_start", lambda program, arguments: started.append(program))
    module, *arguments = shlex.split(command)[2:]
    launch.run(PROGRAMS[module.split(".")[0]], arguments)
    assert len(started) == 1


@pytest.mark.parametrize(("page", "command"), commands(r"tubelet \w+ --"))
def test_commands_of_tubelet(page, command, checkout, monkeypatch):
    """They have valid configurations, too: of a file of the pages, or a shipped one by its name."""
    _, name, *arguments = shlex.split(command)
    kind = {"train": "app", "eval": "evals"}[name]
    started = []
    monkeypatch.setattr(launch, "_start", lambda program, arguments: started.append(program))
    launch.run(PROGRAMS[kind], arguments)
    assert len(started) == (0 if "--help-config" in arguments else 1)


@pytest.mark.parametrize(("page", "command"), commands(r"tubelet report "))
def test_reports(page, command, capsys, monkeypatch):
    monkeypatch.setattr(report, "_write", lambda folders, out: (folders, out))
    monkeypatch.setattr("sys.argv", shlex.split(command)[1:])
    report.main()
    assert "runs" in capsys.readouterr().out


@pytest.mark.parametrize(("page", "command"), commands(r"python -m tools\.gallery \w"))
def test_pictures(page, command, monkeypatch):
    drawn = []
    monkeypatch.setattr(gallery, "save", lambda picture, path: drawn.append(path))
    monkeypatch.setattr(
        gallery, "PICTURES", {k: replace(v, draw=lambda source: None) for k, v in gallery.PICTURES.items()}
    )
    gallery.main(shlex.split(command)[3:])
    assert all((ROOT / path).is_file() for path in drawn)


@pytest.mark.parametrize(
    ("page", "command"), commands(r"python -m (app|evals)\.main_distributed .*(--fname|--batch-launch)")
)
def test_jobs(page, command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)  # jobs run from a copy of what git tracks
    lists = re.findall(r"echo '(.*)' > list.yaml", pages.text(ROOT / page))
    if "list.yaml" in command:
        (content,) = lists
        (tmp_path / "list.yaml").write_text(content)
    module, *arguments = shlex.split(command.replace("list.yaml", str(tmp_path / "list.yaml")))[2:]
    then = {"then": "evals.main"} if module.startswith("app") else {}
    command_line.run(PROGRAMS[module.split(".")[0]], [*arguments, "--dry-run"], **then)
    assert "#SBATCH" in capsys.readouterr().out


@pytest.mark.parametrize(("page", "command"), commands(r"python -m app\.(study|zoo) "))
def test_studies(page, command, checkout):
    module, _, fname, *overrides = shlex.split(command)[2:]
    overrides += ["data=videos"] if overrides == ["data=…"] else []
    options = config.load(fname, overrides, STUDIES[module])
    assert options.folder.startswith("runs/")


@pytest.mark.parametrize(("page", "command"), commands(r"python -m "))
def test_modules(page, command):
    assert importlib.util.find_spec(command.split()[2]) is not None


@pytest.mark.parametrize(("page", "command"), commands(r"python -m benchmarks "))
def test_benchmarks(page, command):
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in command.split()[3:])


@pytest.mark.parametrize(("page", "command"), commands("pytest "))
def test_tests(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[1:]
    words = arguments[arguments.index("-k") + 1] if "-k" in arguments else ""
    paths = [ROOT / argument for argument in arguments if argument.startswith("tests/")]
    assert paths
    texts = [
        "".join(file.read_text(encoding="utf-8") for file in (path.rglob("test_*.py") if path.is_dir() else [path]))
        for path in paths
    ]
    assert all(re.search(rf"def test_\w*{words}", text) for text in texts)


def test_paths(checkout):
    pattern = r"(?<![\w/.<-])(?:app|benchmarks|configs|docs|evals|examples|ideas|src|tests|tools)/[\w/]*(?:\.\w+)?"
    missing, count = {}, 0
    for page in PAGES:
        paths = {path for path in re.findall(pattern, pages.text(page)) if "/my_" not in path}
        count += len(paths)
        for path in paths:
            exists = (ROOT / path).exists() or (checkout / path).exists() or path.startswith(GENERATED)
            if not exists:
                missing.setdefault(page.name, []).append(path)
    assert count > 100
    assert not missing


def test_make_targets():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    used = {command.split()[1] for _, command in commands(r"make [\w-]+")}
    assert used <= set(targets)
    explained = set(re.findall(r"make ([\w-]+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert used <= explained


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    """Links of a page lead to a file in the repository and a heading there, on GitHub and on the site."""
    for link in pages.links(page):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if pages.REFERENCE in target.parents:
            continue
        assert target.is_file(), link
        if page.parent == DOCS or DOCS in page.parents:
            assert DOCS in target.parents, f"{link}: not a part of the site"
        if anchor:
            assert anchor in pages.anchors(target), link


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+\.md", re.sub("#.*", "", navigation)))
    written = {page.relative_to(DOCS).as_posix() for page in PAGES if DOCS in page.parents}
    assert written == {name for name in named if not name.startswith("reference/")}


def test_the_readme_is_short():
    assert len(pages.text(ROOT / "README.md").splitlines()) <= 150
