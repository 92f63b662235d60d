"""The ``torch.backends`` entry point: ``VARLEN_INDUCTOR=1`` turns the rewrite on without a change of code.

PyTorch calls :func:`autoload` at the end of ``import torch`` (not under ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``). An exception
here would break that import for everybody who has us installed, so there is none; and as long as the variable is unset,
nothing is imported either.
"""

import os


def autoload() -> None:
    """Call :func:`varlen_inductor.enable` if the environment asks for it."""
    if os.environ.get("VARLEN_INDUCTOR", "0").strip().lower() in ("", "0", "false", "off", "no"):
        return
    try:
        from varlen_inductor.switch import enable

        enable()
    except Exception as error:
        import warnings

        warnings.warn(f"VARLEN_INDUCTOR is set, but varlen_inductor could not be enabled: {error!r}", stacklevel=2)
