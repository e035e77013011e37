"""One programming task."""

from __future__ import annotations

from dataclasses import dataclass

# What begins after the body of a function.
AFTER_A_FUNCTION = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\nassert ", "\n#", "\n@", "\nimport ", "\nfrom ")


@dataclass(frozen=True)
class Task:
    """prompt: what the model continues. check: statements that raise if the continued program is wrong.

    stops: strings at which what the model writes ends. kept: whether the prompt is part of the program.
    """

    name: str
    prompt: str
    check: str
    stops: tuple[str, ...] = AFTER_A_FUNCTION
    kept: bool = True

    def program(self, completion: str) -> str:
        """The program to run for what the model wrote, which is cut at the first stop."""
        ends = [at for stop in self.stops if (at := completion.find(stop)) >= 0]
        written = completion[: min(ends, default=len(completion))]
        return f"{self.prompt if self.kept else ''}{written}\n\n{self.check}\n"
