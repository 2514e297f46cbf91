"""Sections of a report on the results of a study."""

from pathlib import Path
from typing import Any

from tubelet.report import aggregate, layout, study_figures
from tubelet.report.html_parts import bullets, details, escape, figure, save, table

BARS_CAPTION = (
    "The values of the table; error bars are one standard deviation. Dashed line: best random encoder; dotted: the "
    "same encoder trained from scratch with the labels; dash-dotted: best baseline without a network. Look for: "
    "objectives above the dashed line by more than the error bars (orange), and above the dash-dotted line, which sees "
    "no motion or no content."
)
CURVES_CAPTION = (
    "Accuracy of the frozen encoder during pretraining, the clips and operations of a teacher included. Look for: "
    "curves that still rise at their end, where a longer run would help, and those that have leveled off."
)
COST_CAPTION = (
    "Training steps of the same encoder, measured with nothing else running. Operations are those of matrix products, "
    "forward and backward."
)


def sections(folder: Path, study: dict[str, Any]) -> list[str]:
    """Return the HTML of all data sets of a study; the pictures are written into the folder."""
    datasets = study.get("datasets", {})
    parts = []
    for name, data in datasets.items():
        title = "Does pretraining help?" if len(datasets) == 1 else f"Does pretraining help? Data set {name}"
        prefix = "" if len(datasets) == 1 else f"{name}_"
        parts += [
            f"<h2>{escape(title)}</h2>",
            *(f'<p class="verdict">{escape(sentence)}</p>' for sentence in data["verdict"]),
            results_table(data),
            _descriptions(data),
            bullets(data["notes"]),
            *_optional(folder, f"{prefix}table", "", BARS_CAPTION, study_figures.bars(data)),
            *_curves(folder, prefix, data),
            *_optional(folder, f"{prefix}cost", "Cost", COST_CAPTION, study_figures.costs(data)),
            *([table(rows)] if (rows := layout.cost_table(data)) else []),
            *_margins(data),
            *_scales(data),
        ]
    return parts


def _optional(folder: Path, name: str, title: str, caption: str, drawn: Any) -> list[str]:
    if drawn is None:
        return []
    return [*([f"<h3>{escape(title)}</h3>"] if title else []), figure(save(folder, name, caption, drawn))]


def _curves(folder: Path, prefix: str, data: dict[str, Any]) -> list[str]:
    drawn = study_figures.curves(data)
    if not drawn:
        return []
    pictures = [figure(save(folder, f"{prefix}curves_{axis}", "", picture)) for axis, picture in drawn.items()]
    return ["<h3>Learning curves</h3>", f'<div class="grid">{"".join(pictures)}</div>', f"<p>{CURVES_CAPTION}</p>"]


def results_table(data: dict[str, Any]) -> str:
    """Return the table of a data set: columns of each task side by side; the best of each column is bold."""
    heads = {task: heads for task in data["tasks"] if (heads := layout.heads_of(data, task))}
    columns = [(task, head) for task, of_task in heads.items() for head in of_task]
    first = "".join(
        f'<th scope="colgroup" colspan="{len(of_task)}">{escape(layout.task_title(task))}</th>'
        for task, of_task in heads.items()
    )
    second = "".join(f'<th scope="col">{escape(aggregate.head_title(head))}</th>' for _, head in columns)
    lines = layout.rows_of(data)
    best = {
        (task, head): max(found[0] for row, _ in lines if (found := layout.cell(data, head, row, task)))
        for task, head in columns
    }
    body = []
    for row, title in lines:
        cells = []
        for task, head in columns:
            found = layout.cell(data, head, row, task)
            bold = ' class="best"' if found and found[0] == best[task, head] else ""
            cells.append(f"<td{bold}>{escape(aggregate.text_cell(found))}</td>")
        kind = "pretrained" if row in data["objectives"] else "baseline"
        body.append(f'<tr class="{kind}"><th scope="row">{escape(title)}</th>{"".join(cells)}</tr>')
    texts = {task: layout.baselines_text(data, task) for task in heads}
    if any(texts.values()):
        cells = [f'<td colspan="{len(heads[task])}">{escape(text)}</td>' for task, text in texts.items()]
        body.append(f'<tr class="baseline"><th scope="row">no network</th>{"".join(cells)}</tr>')
    return (
        '<div class="scroll"><table><thead>'
        f'<tr><th scope="col">top-1 accuracy in %, mean ± standard deviation</th>{first}</tr>'
        f'<tr><th scope="col"></th>{second}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _descriptions(data: dict[str, Any]) -> str:
    """Explain the columns and the baselines."""
    used = {head.removesuffix(aggregate.SHUFFLED) for head in data["accuracy"]}
    texts = {aggregate.head_title(head): text for head, text in layout.DESCRIPTIONS.items() if head in used}
    kinds = data["accuracy"].get(aggregate.BASELINE, {})
    texts |= {layout.BASELINES[k]: text for k, text in layout.DESCRIPTIONS_OF_BASELINES.items() if k in kinds}
    items = "".join(f"<li><b>{escape(term)}</b>: {escape(text)}.</li>" for term, text in texts.items())
    return f"<details open><summary>Columns and baselines</summary><ul>{items}</ul></details>"


def _margins(data: dict[str, Any]) -> list[str]:
    """Return the margins of the objectives over their references, with deviations."""
    margins = data.get("margin", {})
    parts = []
    for task in data["tasks"]:
        heads = [head for head in layout.heads_of(data, task) if head in margins]
        rows = [
            [name, *(_margin_text(margins[head].get(name, {}).get(task)) for head in heads)]
            for name in data["objectives"]
        ]
        if heads:
            parts.append(table([[layout.task_title(task), *map(aggregate.head_title, heads)], *rows]))
    if not parts:
        return []
    text = (
        "Points over the best random encoder, for fine-tuning over training from scratch, and the same in standard "
        "deviations of the difference of two single runs."
    )
    return [details("Margins", f"<p>{text}</p>{''.join(parts)}")]


def _margin_text(difference: dict[str, Any] | None) -> str:
    return "-" if difference is None else aggregate.describe(difference)


def _scales(data: dict[str, Any]) -> list[str]:
    """Return the results of random encoders at each initialization scale."""
    tasks = data["tasks"]
    rows = [
        [
            f"{aggregate.head_title(head)}, weights of standard deviation {std}",
            *(aggregate.text_cell(cells.get(task)) for task in tasks),
        ]
        for head, scales in data["random_scales"].items()
        for std, cells in scales.items()
    ]
    if not rows:
        return []
    header = ["random encoder", *map(layout.task_title, tasks)]
    return [details("Random encoder at each initialization scale", table([header, *rows]))]
