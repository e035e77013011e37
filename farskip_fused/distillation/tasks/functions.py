"""The built-in benchmark: small functions from their docstrings, generated, with checks.

For models of any size, without data from elsewhere. Each template has parameters; a hash of template and parameters
decides whether a task is one to train on or one to test with, so that the two never share a task.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from farskip_fused.distillation.data import Document
from farskip_fused.distillation.tasks.task import Task
from farskip_fused.errors import UsageError

# One task in so many is for testing.
TEST_SHARE = 4
CASES = 4
LARGEST = 120
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("red", "green", "blue", "north", "south", "tree", "river", "cloud", "stone", "paper", "light", "sound")
MARKS = "-_:;,.+*/|#"

Inputs = Callable[[random.Random, "Parameters"], Any]


@dataclass(frozen=True)
class Parameters:
    """Two numbers, a letter, a mark and a word, of which a template uses some."""

    a: int
    b: int
    letter: str
    other: str
    mark: str
    word: str


@dataclass(frozen=True)
class Template:
    """signature: name and argument; docstrings: ways to say the same; body: what solves it; inputs: makes an argument.

    docstrings and body are formatted with the parameters.
    """

    signature: str
    docstrings: tuple[str, ...]
    body: str
    inputs: Inputs


def _number(random: random.Random, with_: Parameters) -> int:
    return random.choice([random.randint(-200, 200), with_.a, with_.b, 2 * with_.a, with_.a * with_.b])


def _numbers(random: random.Random, with_: Parameters) -> list[int]:
    return [_number(random, with_) for _ in range(random.randint(3, 9))]


def _text(random: random.Random, with_: Parameters) -> str:
    pieces = (*WORDS, with_.word, with_.letter, with_.word + with_.letter + with_.mark, with_.other + with_.letter)
    return random.choice([" ", with_.mark, with_.letter]).join(random.choices(pieces, k=random.randint(2, 6)))


TEMPLATES = (
    Template("scale_and_shift(x)", ("Multiply x by {a} and add {b}.", "Return {a} times x plus {b}."),
             "return x * {a} + {b}", _number),
    Template("shift_and_scale(x)", ("Add {a} to x, then multiply by {b}.", "Return x plus {a}, times {b}."),
             "return (x + {a}) * {b}", _number),
    Template("square_and_subtract(x)", ("Return the square of x minus {a}.", "Square x and subtract {a}."),
             "return x * x - {a}", _number),
    Template("remainder(x)", ("Return the remainder of x divided by {a}, plus {b}.",), "return x % {a} + {b}", _number),
    Template("quotient_and_remainder(x)", ("Return quotient and remainder of x divided by {a}.",),
             "return x // {a}, x % {a}", _number),
    Template("is_between(x)", ("Whether x lies between {a} and {b}, both included.",),
             "return {a} <= x <= {b}", _number),
    Template("is_multiple(x)", ("Whether x is a multiple of {a} but not of {b}.",),
             "return x % {a} == 0 and x % {b} != 0", _number),
    Template("clip(x)", ("Return x, but at least {a} and at most {a} plus {b}.",),
             "return max({a}, min({a} + {b}, x))", _number),
    Template("distance(x)", ("Return the distance of x from {a}.", "How far x is from {a}."),
             "return abs(x - {a})", _number),
    Template("greater(values)", ("Return the values greater than {a}.", "Keep what is greater than {a}."),
             "return [value for value in values if value > {a}]", _numbers),
    Template("smaller_scaled(values)", ("Return the values smaller than {a}, each times {b}.",),
             "return [value * {b} for value in values if value < {a}]", _numbers),
    Template("count_equal(values)", ("Count the values equal to {a}.", "How many values are {a}."),
             "return values.count({a})", _numbers),
    Template("sum_of_multiples(values)", ("Return the sum of the values that are multiples of {a}.",),
             "return sum(value for value in values if value % {a} == 0)", _numbers),
    Template("all_shifted(values)", ("Add {a} to each of the values.", "Return the values, each plus {a}."),
             "return [value + {a} for value in values]", _numbers),
    Template("largest_below(values)", ("Return the largest value below {a}, or {b} if there is none.",),
             "return max((value for value in values if value < {a}), default={b})", _numbers),
    Template("to_products(values)", ("Return a dictionary from each value to the value times {a}.",),
             "return {{value: value * {a} for value in values}}", _numbers),
    Template("replace_number(values)", ("Return the values with every {a} replaced by {b}.",),
             "return [{b} if value == {a} else value for value in values]", _numbers),
    Template("any_at_least(values)", ("Whether any of the values is at least {a}.",),
             "return any(value >= {a} for value in values)", _numbers),
    Template("swap_letters(text)", ("Replace every {letter!r} in text by {other!r}.",),
             "return text.replace({letter!r}, {other!r})", _text),
    Template("count_letter(text)", ("Count how often {letter!r} is in text, times {a}.",),
             "return text.count({letter!r}) * {a}", _text),
    Template("surround(text)", ("Put {word!r} before text and {mark!r} after it.",),
             "return {word!r} + text + {mark!r}", _text),
    Template("join_words(text)", ("Join the words of text by {mark!r} and add {a}.",),
             "return {mark!r}.join(text.split()) + str({a})", _text),
    Template("starts_or_ends(text)", ("Whether text starts with {letter!r} or ends with {other!r}.",),
             "return text.startswith({letter!r}) or text.endswith({other!r})", _text),
    Template("without(text)", ("Return text without {letter!r} and {mark!r}.",),
             "return text.replace({letter!r}, '').replace({mark!r}, '')", _text),
)  # fmt: skip


def function_tasks(count: int, seed: int = 0) -> list[Task]:
    """Different tasks to test with, the same for a seed; UsageError if there are not so many."""
    tasks = []
    for template, parameters, randomness in draw(count, seed, for_test=True):
        name = template.signature.partition("(")[0]
        prompt, solution = written(template, parameters, randomness)
        tasks.append(Task(name, prompt, check_program(name, prompt + solution, template, parameters, randomness)))
    return tasks


def training_documents(count: int, seed: int = 0) -> list[Document]:
    """Solved tasks to train on, as documents; none of them is among those to test with."""
    documents = []
    for template, parameters, randomness in draw(count, seed, for_test=False):
        text = "".join(written(template, parameters, randomness))
        documents.append(Document(template.signature, text, hashlib.sha256(text.encode()).hexdigest()))
    return documents


def draw(count: int, seed: int, *, for_test: bool) -> Iterator[tuple[Template, Parameters, random.Random]]:
    randomness = random.Random(f"{seed}, {for_test}")
    seen: set[str] = set()
    misses = 0
    while len(seen) < count:
        template, parameters = randomness.choice(TEMPLATES), _parameters(randomness)
        # By what is written, so that parameters that a template does not use make no other task.
        key = template.signature + template.body.format(**vars(parameters))
        is_test = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % TEST_SHARE == 0
        if is_test != for_test or key in seen:
            misses += 1
            if misses > 1000 * TEST_SHARE:
                raise UsageError(
                    f"{count} different small functions were asked for; there are not so many, ask for less."
                )
            continue
        misses = 0
        seen.add(key)
        yield template, parameters, randomness


def _parameters(randomness: random.Random) -> Parameters:
    a, b = randomness.sample(range(2, LARGEST), 2)
    letter, other = randomness.sample(LETTERS, 2)
    return Parameters(a, b, letter, other, randomness.choice(MARKS), randomness.choice(WORDS))


def written(template: Template, parameters: Parameters, randomness: random.Random) -> tuple[str, str]:
    """The prompt, up to the docstring, and the rest of the function."""
    docstring = randomness.choice(template.docstrings).format(**vars(parameters))
    body = template.body.format(**vars(parameters))
    return f'def {template.signature}:\n    """{docstring}"""\n', f"    {body}\n"


def check_program(name: str, source: str, template: Template, parameters: Parameters, randomness: random.Random) -> str:
    """Assertions of what the solution returns."""
    scope: dict[str, Any] = {}
    exec(source, scope)  # generated above, not by a model
    arguments = [template.inputs(randomness, parameters) for _ in range(CASES)]
    return "\n".join(f"assert {name}({each!r}) == {scope[name](each)!r}" for each in arguments)
