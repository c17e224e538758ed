"""python -m lora_kernels env | finetune"""

import sys

USAGE = """usage: python -m lora_kernels COMMAND [OPTION ...]

commands:
  env        print what was built and what this machine can run
  finetune   fine-tune a causal language model with LoRA or QLoRA (finetune --help)
"""


def main(argv: list[str]) -> int:
    command, rest = (argv[0] if argv else None), argv[1:]
    if command == "env":
        from lora_kernels.environment import main as env

        return env(rest)
    if command == "finetune":
        from lora_kernels.finetune.cli import main as finetune

        return finetune(rest)
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    print(USAGE, end="", file=sys.stderr)
    if command is not None:
        print(f"lora_kernels: error: no command {command!r}; expected env or finetune", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
