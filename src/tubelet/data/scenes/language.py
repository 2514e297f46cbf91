"""Captions of scenes, and questions about them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tubelet.data.scenes.scene import ATTRIBUTES, Scene

_PLURAL = {"cross": "crosses"}
TEMPLATES = (
    "{group} {drift} {direction} while the camera {camera}, {first} and then {second}",
    "the camera {camera} as {group} {drift} {direction}; {they} {first}, then {second}",
)


def caption(scene: Scene, template: int) -> str:
    """Describe all attributes of a scene.

    Example:
        >>> caption(Scene("three", "red", "square", "left", "zooms in", "flash", "swell"), 0)
        'three red squares drift left while the camera zooms in, flash and then swell'
    """
    one = scene.number == 1
    noun = scene.shape if one else _PLURAL.get(scene.shape, f"{scene.shape}s")
    verb = (lambda word: f"{word}es" if word.endswith("sh") else f"{word}s") if one else str
    return TEMPLATES[template].format(
        group=f"{scene.count} {scene.color} {noun}",
        they="it" if one else "they",
        drift=verb("drift"),
        direction=scene.direction,
        camera=scene.camera,
        first=verb(scene.first),
        second=verb(scene.second),
    )


def parse(text: str) -> Scene | None:
    """Return the scene that a caption describes; None if it is no caption of the grammar."""
    return _SCENES.get(text)


@dataclass(frozen=True)
class Question:
    """A question about a scene. type: count, color, shape, direction, camera or order."""

    type: str
    text: str
    answer: str
    options: tuple[str, ...]
    """Answers to choose from; `answer` is one of them."""


_QUESTIONS = {
    "count": "how many objects are there ?",
    "color": "what color are the objects ?",
    "shape": "what shape are the objects ?",
    "direction": "where do the objects drift ?",
    "camera": "what does the camera do ?",
}
QUESTION_TYPES = (*_QUESTIONS, "order")


def questions(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """Ask one question of each type. Without the video, all options of a question are equally probable."""
    asked = [
        Question(name, text, getattr(scene, name), tuple(rng.permutation(ATTRIBUTES[name]).tolist()))
        for name, text in _QUESTIONS.items()
    ]
    events = tuple(rng.permutation([scene.first, scene.second]).tolist())
    text = f"what comes first , the {events[0]} or the {events[1]} ?"
    return [*asked, Question("order", text, scene.first, events)]


def _all_scenes() -> Iterator[Scene]:
    grid = np.indices([len(values) for values in ATTRIBUTES.values()]).reshape(len(ATTRIBUTES), -1).T
    for row in grid.tolist():
        scene = Scene(*(values[i] for values, i in zip(ATTRIBUTES.values(), row, strict=True)))
        if scene.first != scene.second:
            yield scene


_SCENES = {caption(scene, template): scene for scene in _all_scenes() for template in range(len(TEMPLATES))}
