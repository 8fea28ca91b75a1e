"""A recipe file into a checked recipe: every mistake with its line, its field and what would do."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qserve.quant.errors import RecipeError
from qserve.quant.recipe.schema import Recipe

Path_ = tuple[str | int, ...]


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises ``RecipeError`` with all of its mistakes, a line each.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): give a recipe file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start})") from None
    return parse_recipe(text, path.name)


def parse_recipe(text: str, name: str) -> Recipe:
    """The recipe in a YAML text. name: of its file, for messages."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = _plain(node, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{name}:{mark.line + 1}" if mark else name
        raise RecipeError(f"{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise RecipeError(f"{name}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"{name}: holds {'nothing' if content is None else 'no keys'}, expected some such as "
            "`model` and `output`: "
            "`qserve recipe init` writes a recipe to start from"
        )
    lines = _lines(node)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        mistakes = [_explain(mistake, lines, name) for mistake in error.errors()]
        raise RecipeError("; ".join(mistakes)) from None


def _plain(node: yaml.Node | None, name: str) -> Any:
    """The value of a document, refused where a key is given twice: YAML would drop the first."""
    for mapping in _mappings(node):
        seen: dict[str, int] = {}
        for key, _ in mapping.value:
            if key.value in seen:
                raise RecipeError(
                    f"{name}:{key.start_mark.line + 1}: {key.value!r} is given twice, first in "
                    f"line {seen[key.value]}: keep one"
                )
            seen[key.value] = key.start_mark.line + 1
    return None if node is None else yaml.SafeLoader("").construct_document(node)


def _mappings(node: yaml.Node | None) -> list[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        inner = [found for _, value in node.value for found in _mappings(value)]
        return [node, *inner]
    if isinstance(node, yaml.SequenceNode):
        return [found for value in node.value for found in _mappings(value)]
    return []


def _lines(node: yaml.Node | None, path: Path_ = ()) -> dict[Path_, int]:
    """The line of every field, by its path."""
    if node is None:
        return {}
    lines = {path: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines |= _lines(value, (*path, key.value))
            lines[*path, key.value] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines |= _lines(value, (*path, index))
    return lines


def _explain(mistake: ErrorDetails, lines: dict[Path_, int], name: str) -> str:
    """One mistake in a line: where, which field, what was given, what would do."""
    path = tuple(mistake["loc"])
    known = next(path[:end] for end in range(len(path), -1, -1) if path[:end] in lines)
    field = ".".join(map(str, path)) or "recipe"
    where = f"{name}:{lines[known]}: {field}"
    message = mistake["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if mistake["type"] == "missing":
        return f"{where}: missing: {_described(path)}"
    if mistake["type"] == "extra_forbidden":
        return f"{where}: unknown key{_suggest(path)}"
    if isinstance(mistake["input"], dict | list):
        return f"{where}: {message}"
    return f"{where}: got {mistake['input']!r}: {message}"


def _section_at(path: Path_) -> type[BaseModel]:
    """The class of the section that holds the last key of a path."""
    section: type[BaseModel] = Recipe
    for key in path[:-1]:
        field = _fields(section).get(str(key))
        annotation = getattr(field, "annotation", None)
        options = [annotation, *getattr(annotation, "__args__", ())]
        found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not found:
            break
        section = found[0]
    return section


def _fields(section: type[BaseModel]) -> dict[str, Any]:
    """The fields of a section by the names that a recipe uses."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _suggest(path: Path_) -> str:
    names = list(_fields(_section_at(path)))
    close = difflib.get_close_matches(str(path[-1]), names, n=1)
    return f", did you mean {close[0]!r}?" if close else f": expected one of {', '.join(names)}"


def _described(path: Path_) -> str:
    field = _fields(_section_at(path))[str(path[-1])]
    return str(field.description or "a section of its own").rstrip(".").lower()
