"""llm-compressor's recipes as ours: the modifiers that quantize, as far as they can be expressed.

(owner: llm-compressor 0.14; its recipes are `STAGE: {MODIFIERS: {NAME: {...}}}`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qserve.quant.errors import RecipeError

PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": {"num_bits": 4, "group_size": 128, "symmetric": True},
    "W4A16_ASYM": {"num_bits": 4, "group_size": 128, "symmetric": False},
    "W8A16": {"num_bits": 8, "group_size": None, "symmetric": True},
    "W8A8": {"num_bits": 8, "group_size": None, "symmetric": True, "activations": True},
    "INT8": {"num_bits": 8, "group_size": None, "symmetric": True, "activations": True},
    "FP8_DYNAMIC": {"num_bits": 8, "group_size": None, "float": True, "activations": True},
}
"""What the names of `scheme` stand for (compressed-tensors 0.19)."""

QUANTIZING = ("AWQModifier", "GPTQModifier", "QuantizationModifier")
SMOOTHING = "SmoothQuantModifier"

HARMLESS = ("AWQModifier.duo_scaling", "GPTQModifier.block_size")
"""Settings of a search that ours makes in its own way."""


@dataclass(frozen=True, slots=True)
class Imported:
    """The text of a recipe of ours, and what it does not carry over."""

    text: str
    notes: tuple[str, ...]


def import_recipe(path: Path, model: str, output: str) -> Imported:
    """Translate the recipe in ``path``.

    Raises ``RecipeError`` when it is not one of llm-compressor's, or holds nothing that quantizes.
    """
    modifiers = list(_modifiers(path))
    names = [name for name, _ in modifiers]
    notes: list[str] = []
    merged: dict[str, Any] = {}
    for name, settings in modifiers:
        if name in (*QUANTIZING, SMOOTHING):
            merged |= {key: value for key, value in settings.items() if value is not None}
        else:
            notes.append(f"{name} is left out: it has no counterpart")
    if not set(names) & set(QUANTIZING):
        raise RecipeError(
            f"{path} holds {', '.join(names) or 'no modifier'}: expected one of llm-compressor's "
            f"that quantizes, {', '.join(QUANTIZING)}"
        )
    weights = _weights(merged, path)
    section: dict[str, Any] = {"method": _method(names, weights)}
    if section["method"] in ("awq", "gptq", "int4"):
        section["bits"] = weights["num_bits"]
        if weights["group_size"]:
            section["group_size"] = weights["group_size"]
    if merged.get("kv_cache_scheme"):
        section["kv_cache"] = _cache_format(merged["kv_cache_scheme"], path)
        section["format"] = "compressed-tensors"
    if "dampening_frac" in merged:
        section["damping"] = merged["dampening_frac"]
    ignored = [entry for entry in merged.get("ignore", []) if entry != "lm_head"]
    if ignored:
        section["ignore"] = [_pattern(entry) for entry in ignored]
    notes += _left_out(modifiers)
    content = {"version": 1, "model": model, "quantize": section, "output": {"folder": output}}
    return Imported(yaml.safe_dump(content, sort_keys=False), tuple(notes))


def _modifiers(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every modifier with its settings, in order."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): give a recipe file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no stages: expected a recipe of llm-compressor")
    for stage in content.values():
        groups = stage.values() if isinstance(stage, dict) else ()
        for group in groups:
            if isinstance(group, dict):
                for name, settings in group.items():
                    yield str(name), settings if isinstance(settings, dict) else {}


def _weights(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Bits, group size, symmetry and whether activations are quantized."""
    scheme = settings.get("scheme")
    if isinstance(scheme, dict):
        scheme = next(iter(scheme), None)
    if isinstance(scheme, str):
        if scheme not in PRESETS:
            raise RecipeError(f"{path}: scheme {scheme}: expected one of {', '.join(PRESETS)}")
        return PRESETS[scheme]
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise RecipeError(f"{path}: expected a scheme, or config_groups with one group")
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or weights.get("type", "int") not in ("int", "float"):
        raise RecipeError(f"{path}: the group has no integer or float weights")
    is_float = weights.get("type") == "float"
    if is_float and weights.get("num_bits", 8) != 8:
        raise RecipeError(f"{path}: floats of {weights['num_bits']} bits: expected 8")
    return {
        "num_bits": weights.get("num_bits", 8),
        "group_size": weights.get("group_size"),
        "symmetric": weights.get("symmetric", True),
        "float": is_float,
        "activations": group.get("input_activations") is not None,
    }


def _cache_format(scheme: Any, path: Path) -> str:
    """What keys and values are stored as."""
    if not isinstance(scheme, dict) or scheme.get("num_bits") != 8:
        raise RecipeError(f"{path}: kv_cache_scheme {scheme}: expected one of 8 bits")
    return "fp8" if scheme.get("type") == "float" else "int8"


def _method(names: list[str], weights: dict[str, Any]) -> str:
    if weights.get("float"):
        return "fp8" if weights.get("activations") else "fp8-weight"
    if weights.get("activations"):
        return "smoothquant"
    if weights["num_bits"] == 8:
        return "int8"
    if weights["symmetric"] and weights["num_bits"] == 4:
        return "int4"
    return "gptq" if weights["symmetric"] or "GPTQModifier" in names else "awq"


def _pattern(entry: str) -> str:
    """An entry of `ignore`: a name, or a pattern after ``re:``."""
    return entry.removeprefix("re:") if entry.startswith("re:") else entry.replace(".", r"\.")


def _left_out(modifiers: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    used = {"scheme", "config_groups", "ignore", "targets", "dampening_frac", "kv_cache_scheme"}
    for name, settings in modifiers:
        for key in settings:
            if key not in used and f"{name}.{key}" not in HARMLESS:
                yield f"{name}.{key} is left out"
