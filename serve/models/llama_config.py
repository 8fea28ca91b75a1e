"""The sizes and constants of a Llama, read from its ``config.json`` and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qserve.kernels.kv_store import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.serve.models.mixture_config import MixtureConfig, read_mixture

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
)


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What the forward pass needs to know; names as in transformers, where they agree with ours.

    windows: of each layer, the positions that a row sees, its own included; None is all before it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    mixture: MixtureConfig | None = None

    @classmethod
    def from_json(cls, config: Mapping[str, Any], architecture: str) -> LlamaConfig:
        """Raises ``UnsupportedModelError`` for a model that is not computed like a Llama, and
        ``CheckpointError`` for a config that lacks a size."""
        _check_architecture(config, architecture)
        heads = _positive(config, "num_attention_heads")
        hidden = _positive(config, "hidden_size")
        theta, scaling = _rope(config)
        num_layers = _positive(config, "num_hidden_layers")
        return cls(
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_positions=_positive(config, "max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            windows=_windows(config, architecture, num_layers),
            mixture=read_mixture(config, architecture),
        )


def _check_architecture(config: Mapping[str, Any], architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{architecture} cannot be served: expected one of {', '.join(ARCHITECTURES)}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(
            f"{architecture} with hidden_act {config['hidden_act']!r} cannot be served: expected "
            "'silu'"
        )


def _windows(
    config: Mapping[str, Any], architecture: str, num_layers: int
) -> tuple[int | None, ...]:
    """The window of every layer that ``layer_types`` calls sliding, of all where it is not given.

    A Llama has none, whatever its config says.
    """
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is None or architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    window = _positive(config, "sliding_window")
    kinds = config.get("layer_types")
    if kinds is None and "max_window_layers" in config:
        raise UnsupportedModelError(
            f"{architecture} with a sliding window of {window} tokens in some layers: config.json "
            "must say in layer_types in which"
        )
    kinds = kinds or ("sliding_attention",) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:num_layers])


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from ``rope_parameters`` or the keys that transformers 4 wrote."""
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(block.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = block.get("rope_type") or block.get("type") or "default"
    if block.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("rotary embeddings of a part of each head are not computed")
    if kind == "default":
        return theta, None
    try:
        if kind == "linear":
            return theta, LinearScaling(float(block["factor"]))
        if kind == "llama3":
            return theta, Llama3Scaling(
                factor=float(block["factor"]),
                low_freq_factor=float(block["low_freq_factor"]),
                high_freq_factor=float(block["high_freq_factor"]),
                original_max_positions=int(block["original_max_position_embeddings"]),
            )
        if kind == "yarn":
            return theta, _yarn(block)
    except KeyError as error:
        raise CheckpointError(
            f"config.json asks for {kind} scaling of rotary embeddings without {error}"
        ) from None
    raise UnsupportedModelError(
        f"rotary embeddings of type {kind!r} are not computed: expected default, linear, "
        "llama3 or yarn"
    )


def _yarn(block: Mapping[str, Any]) -> YarnScaling:
    """Absent and null settings have transformers' values."""
    given = {
        "attention_factor": block.get("attention_factor"),
        "beta_fast": block.get("beta_fast") or None,
        "beta_slow": block.get("beta_slow") or None,
        "mscale": block.get("mscale"),
        "mscale_all_dim": block.get("mscale_all_dim"),
    }
    return YarnScaling(
        factor=float(block["factor"]),
        original_max_positions=int(block["original_max_position_embeddings"]),
        truncate=bool(block.get("truncate", True)),
        **{name: float(value) for name, value in given.items() if value is not None},
    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json has {key} {value!r}: expected a positive number")
    return value
