"""Signatures: few parameters, and few of the type `Config`."""

import ast
from collections import Counter

import pytest

from tests.test_floors import FILES, relative, room

MAX_PARAMETERS = 8
MAX_CONFIG_PARAMETERS = {
    "config": 7,
    "build": 4,
    "training": 22,
    "pretrained": 22,
    "evaluation": 3,
    "run": 4,
    "tools": 13,
    "cli": 2,
}
"""Most parameters of the type `Config` in a room; other rooms have none."""


def functions(path):
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def parameters(function):
    found = function.args
    return [*found.posonlyargs, *found.args, *found.kwonlyargs]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_signature_has_more_than_eight_parameters(path):
    for function in functions(path):
        names = {p.arg for p in parameters(function)} - {"self", "cls"}
        assert len(names) <= MAX_PARAMETERS, function.name


def takes_config(parameter):
    if parameter.annotation is None:
        return False
    return ast.unparse(parameter.annotation) in ("Config", "Config | None")


def test_number_of_config_parameters_in_each_room_is_limited():
    found = Counter(
        room(path)
        for path in FILES
        for function in functions(path)
        for parameter in parameters(function)
        if takes_config(parameter)
    )
    too_many = {
        name: (num, MAX_CONFIG_PARAMETERS.get(name, 0))
        for name, num in found.items()
        if num > MAX_CONFIG_PARAMETERS.get(name, 0)
    }
    assert not too_many
