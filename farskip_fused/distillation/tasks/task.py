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

    @property
    def asked(self) -> str:
        """The prompt as a model sees it, without whitespace at its end.

        Tokenizers join a line's end and the indentation that follows. After a prompt that ends at the line's end, a
        model therefore continues as after a text that ends there, mostly with the end of the text.
        """
        return self.prompt.rstrip()

    def program(self, completion: str) -> str:
        """The program to run for what the model wrote, which is cut at the first stop."""
        written = completion.lstrip("\n")
        begun = f"{self.asked}\n" if completion.startswith("\n") else self.prompt
        ends = [at for stop in self.stops if (at := written.find(stop)) >= 0]
        written = written[: min(ends, default=len(written))]
        return f"{begun if self.kept else ''}{written}\n\n{self.check}\n"
