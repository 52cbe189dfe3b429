"""`python -m peft_s0` is `peft-s0`, also where a launcher starts modules: `torchrun -m peft_s0 run train.py`."""

from peft_s0_cli import main

main()
