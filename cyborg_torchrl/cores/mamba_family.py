"""Named stacks: `mamba`, `mamba2`, `pseudo_mamba`, `mamba_gru`.

The options of each builder are written out, because signatures are the source of the typed configuration.
"""

from __future__ import annotations

from cyborg_torchrl.cores.stack import StackCore, build_stack
from cyborg_torchrl.registry import did_you_mean, register_backbone


@register_backbone("mamba")
def build_mamba(
    in_features: int,
    *,
    hidden_size: int = 64,
    num_layers: int = 1,
    max_horizon: int | None = None,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 2,
    readout: str = "timescale_norm",
    readout_groups: int = 16,
    learn_initial_state: bool = False,
    kernel: str = "auto",
) -> StackCore:
    """Build a stack of Mamba-1 blocks with pre-norm residuals. `MambaBlock` describes the options."""
    block = {"name": "mamba", "d_state": d_state, "d_conv": d_conv, "expand": expand, "kernel": kernel}
    return build_stack(
        in_features,
        layers=[block],
        depth=num_layers,
        hidden_size=hidden_size,
        max_horizon=max_horizon,
        readout=readout,
        readout_groups=readout_groups,
        learn_initial_state=learn_initial_state,
    )


@register_backbone("mamba2")
def build_mamba2(
    in_features: int,
    *,
    hidden_size: int = 64,
    num_layers: int = 1,
    max_horizon: int | None = None,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 2,
    headdim: int = 8,
    readout: str = "timescale_norm",
    readout_groups: int = 16,
    learn_initial_state: bool = False,
    kernel: str = "auto",
) -> StackCore:
    """Build a stack of Mamba-2 blocks with pre-norm residuals. `Mamba2Block` describes the options."""
    block = {
        "name": "mamba2",
        "d_state": d_state,
        "d_conv": d_conv,
        "expand": expand,
        "headdim": headdim,
        "kernel": kernel,
    }
    return build_stack(
        in_features,
        layers=[block],
        depth=num_layers,
        hidden_size=hidden_size,
        max_horizon=max_horizon,
        readout=readout,
        readout_groups=readout_groups,
        learn_initial_state=learn_initial_state,
    )


@register_backbone("pseudo_mamba")
def build_pseudo_mamba(
    in_features: int,
    *,
    hidden_size: int = 64,
    num_layers: int = 1,
    max_horizon: int | None = None,
    expand: int = 2,
    readout: str = "timescale_norm",
    readout_groups: int = 16,
    learn_initial_state: bool = False,
) -> StackCore:
    """Build a stack of pseudo-Mamba blocks with pre-norm residuals. `PseudoMambaBlock` describes the options."""
    return build_stack(
        in_features,
        layers=[{"name": "pseudo_mamba", "expand": expand}],
        depth=num_layers,
        hidden_size=hidden_size,
        max_horizon=max_horizon,
        readout=readout,
        readout_groups=readout_groups,
        learn_initial_state=learn_initial_state,
    )


@register_backbone("mamba_gru")
def build_mamba_gru(
    in_features: int,
    *,
    mamba: str = "mamba",
    hidden_size: int = 64,
    num_layers: int = 1,
    max_horizon: int | None = None,
    d_state: int = 16,
    readout: str = "timescale_norm",
    readout_groups: int = 16,
    learn_initial_state: bool = False,
    kernel: str = "auto",
) -> StackCore:
    """Build pairs of a Mamba block and a GRU, each with its pre-norm residual.

    Args:
        in_features: F, features of the input.
        mamba: "mamba" or "mamba2".
        hidden_size: width of both.
        num_layers: number of pairs.
        max_horizon: steps that memory should bridge.
        d_state: numbers that each channel of the Mamba block keeps.
        readout: "timescale_norm" or "none".
        readout_groups: groups of the time-scale norm.
        learn_initial_state: make the initial states parameters.
        kernel: scan of the Mamba block, as in `MambaBlock`.

    Raises:
        ValueError: for an unknown block, or a number below 1.
    """
    if mamba not in ("mamba", "mamba2"):
        raise ValueError(f"unknown mamba '{mamba}': {did_you_mean(mamba, ('mamba', 'mamba2'))}")
    return build_stack(
        in_features,
        layers=[{"name": mamba, "d_state": d_state, "kernel": kernel}, "gru"],
        depth=num_layers,
        hidden_size=hidden_size,
        max_horizon=max_horizon,
        readout=readout,
        readout_groups=readout_groups,
        learn_initial_state=learn_initial_state,
    )
