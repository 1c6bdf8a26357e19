"""What can go wrong between an artifact and a prediction."""

from __future__ import annotations


class EngineError(Exception):
    """The root of every error an engine raises."""


class LoadError(EngineError):
    """The artifact cannot be loaded or bound; the message names the file, tensor or program and the rule."""


class BindingError(LoadError):
    """Tensors and parameters do not meet. `missing`, `unexpected`, `mismatched` hold the names, sorted."""

    def __init__(self, message: str, *, missing: list[str], unexpected: list[str], mismatched: list[str]) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.mismatched = missing, unexpected, mismatched


class TemplateError(LoadError):
    """An architecture cannot become a template, or a tensor no part of a program; the message names it and the rule."""


class ImpureProgram(TemplateError):
    """No pure function: the program changes what it holds or its input, is random, or mixes the rows of a batch."""


class InvalidInput(EngineError, ValueError):
    """An inference input breaks the contract: unknown name, wrong datatype, wrong shape, not the right byte count."""


class GoldenMismatch(EngineError):
    """Outputs differ from the reference golden beyond its tolerance. `worst` is the largest excess, absolute."""

    def __init__(self, message: str, *, worst: float) -> None:
        super().__init__(message)
        self.worst = worst
