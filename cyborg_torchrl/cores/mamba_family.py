"""Named stacks of one block: `mamba`, `mamba2`, `pseudo_mamba`, `ffm`, `gated_delta`; and `mamba_gru`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cyborg_torchrl.cores.stack import BLOCKS, StackCore, build_stack
from cyborg_torchrl.registry import did_you_mean, register_backbone, with_options_of


def _register_stack_of(block: str) -> Callable[..., StackCore]:
    """Register the builder of a stack of one block with pre-norm residuals. The block's class describes the options."""

    @register_backbone(block)
    @with_options_of(BLOCKS[block], without=["official"])
    def build(
        in_features: int,
        *,
        hidden_size: int = 64,
        num_layers: int = 1,
        max_horizon: int | None = None,
        **options: Any,
    ) -> StackCore:
        layers = [{"name": block, **options}]
        return build_stack(
            in_features, layers=layers, depth=num_layers, hidden_size=hidden_size, max_horizon=max_horizon
        )

    return build


build_mamba = _register_stack_of("mamba")
"""Build the core of `backbone=mamba`: a stack of `MambaBlock`."""
build_mamba2 = _register_stack_of("mamba2")
"""Build the core of `backbone=mamba2`: a stack of `Mamba2Block`."""
build_ffm = _register_stack_of("ffm")
"""Build the core of `backbone=ffm`: a stack of `FFMBlock`."""
build_gated_delta = _register_stack_of("gated_delta")
"""Build the core of `backbone=gated_delta`: a stack of `GatedDeltaBlock`."""
build_pseudo_mamba = _register_stack_of("pseudo_mamba")
"""Build the core of `backbone=pseudo_mamba`: a stack of `PseudoMambaBlock`."""


@register_backbone("mamba_gru")
@with_options_of(build_stack, without=["layers", "depth"])
def build_mamba_gru(
    in_features: int,
    *,
    mamba: str = "mamba",
    num_layers: int = 1,
    d_state: int = 16,
    kernel: str = "auto",
    **options: Any,
) -> StackCore:
    """Build pairs of a Mamba block and a GRU, each with its pre-norm residual. `build_stack` gets the other options.

    Args:
        in_features: F, features of the input.
        mamba: "mamba" or "mamba2".
        num_layers: number of pairs.
        d_state: numbers that each channel of the Mamba block keeps.
        kernel: scan of the Mamba block, as in `MambaBlock`.
        options: other options of `build_stack`.

    Raises:
        ValueError: for an unknown block, or a number below 1.
    """
    if mamba not in ("mamba", "mamba2"):
        raise ValueError(f"unknown mamba '{mamba}': {did_you_mean(mamba, ('mamba', 'mamba2'))}")
    layers = [{"name": mamba, "d_state": d_state, "kernel": kernel}, "gru"]
    return build_stack(in_features, layers=layers, depth=num_layers, **options)
