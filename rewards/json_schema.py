"""Answers that are JSON of a given shape. Needs the package `jsonschema`."""

import functools
import json
from typing import Any

from rewards.api import BadReference, Problem, Verdict
from rewards.formats import answer_text

_MAX_ANSWER = 100_000


def json_answer(completion: str, problem: Problem) -> float:
    """1.0 if the answer block is JSON that the reference, a JSON schema, allows.

    Strict JSON: no NaN or Infinity, no key twice. A ```json fence around it is dropped. Only
    references inside the schema itself are followed; nothing is fetched.

    Raises:
      BadReference: it is no valid schema.
      ModuleNotFoundError: jsonschema is not installed.
    """
    validator = _validator(json.dumps(problem.reference))
    answer = answer_text(completion)
    if answer is None or not answer.strip():
        return Verdict(0.0, "no answer")
    if len(answer) > _MAX_ANSWER:
        return Verdict(0.0, "too long", answer)
    try:
        value = json.loads(_unfenced(answer), object_pairs_hook=_unique, parse_constant=_refused)
        fault = next(validator.iter_errors(value), None)
    except (ValueError, RecursionError):
        return Verdict(0.0, "no JSON", answer)
    if fault is not None:
        return Verdict(0.0, f"breaks the schema: {fault.message}", answer)
    return Verdict(1.0, "right", answer)


@functools.lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
        import referencing
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'json_answer needs jsonschema: pip install "grpo[schema]"'
        ) from error
    loaded = json.loads(schema)
    if not isinstance(loaded, dict | bool):
        raise BadReference(f"the reference is no JSON schema: {schema[:80]}")
    kind = jsonschema.validators.validator_for(loaded, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(loaded)
    except jsonschema.SchemaError as error:
        raise BadReference(f"the reference is no JSON schema: {error.message[:200]}") from error
    return kind(loaded, registry=referencing.Registry())


def _unfenced(text: str) -> str:
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text.partition("\n")[2].removesuffix("```")
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
