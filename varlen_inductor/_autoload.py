"""The ``torch.backends`` entry point: ``VARLEN_INDUCTOR=1`` turns the rewrite on without a change of code.

PyTorch calls :func:`autoload` at the end of ``import torch`` (not under ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``). An exception
here would break that import for everybody who has us installed, so there is none; and as long as no variable speaks of us,
nothing is imported either.
"""

import os


def autoload() -> None:
    """Call :func:`varlen_inductor.enable` if the environment asks for it."""
    enabled = os.environ.get("VARLEN_INDUCTOR", "0").strip().lower() not in ("", "0", "false", "off", "no")
    logged = "varlen_inductor" in os.environ.get("TORCH_LOGS", "")
    if not enabled and not logged:
        return
    try:
        if logged:
            # PyTorch reads TORCH_LOGS next (from 2.13 on; before, it has done so). It imports all subpackages of a name that
            # it does not know as a log's, which takes longer than the rest of `import torch`.
            from varlen_inductor._compat import register_log

            register_log()
        if enabled:
            from varlen_inductor.switch import enable

            enable()
    except Exception as error:
        import warnings

        warnings.warn(f"varlen_inductor could not be set up as the environment asks: {error!r}", stacklevel=2)
