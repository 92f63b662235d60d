"""``python -m varlen_inductor demo`` and ``python -m varlen_inductor doctor``."""

from __future__ import annotations

import sys

USAGE = """usage: python -m varlen_inductor COMMAND [OPTIONS]

commands:
  demo     BERT on real text: plain torch.compile beside backend="varlen_inductor"
  doctor   what this machine can run, and what is missing for the rest
"""


def main(argv: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "demo":
        from varlen_inductor.demo import main as demo

        return demo(rest)
    if command == "doctor":
        from varlen_inductor.doctor import main as doctor

        return doctor(rest)
    print(USAGE, end="", file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    raise SystemExit(main())
