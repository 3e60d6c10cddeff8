"""The products of float32 in a lowered program, and the precision of each."""

import re

PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\W.*")
OF_FLOAT32 = re.compile(r": \(tensor<(?:\d+x)*f32>, tensor<(?:\d+x)*f32>\)")
NAME = re.compile(r"\b(?:DEFAULT|HIGH|HIGHEST)\b")


def precisions(text: str) -> list[str]:
    """Return the precision of both factors of every product, as in `HIGHEST HIGHEST`.

    Args:
      text: StableHLO of a program.
    """
    lines = [line for line in PRODUCT.findall(text) if OF_FLOAT32.search(line)]
    assert len(lines) == len(re.findall(r"stablehlo\.(?:dot|convolution)", text))
    # A program that was written and read leaves the default out.
    return [" ".join(NAME.findall(line)) or "DEFAULT DEFAULT" for line in lines]
