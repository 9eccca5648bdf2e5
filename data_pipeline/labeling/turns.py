"""One question through all its turns: longer, to another model, repaired; from the ledger where it is there.

Nothing here sends: settle() is given where replies come from.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace

from pydantic import BaseModel

from data_pipeline.labeling.findings import ERROR, Finding
from data_pipeline.labeling.ledger import LedgerLine, ShardLedger, request_key
from storyanchors.vlm import VlmRequest, VlmUsage, parse_answer

REPAIR_ID = "repair-v1"
REPAIR_PROMPT = (
    "You answered this before. The answer is between the lines, it cannot be used as it is.\n"
    "-----\n{answer}\n-----\nWhat is wrong with it:\n{problems}\n"
    "Answer the whole question again, in the same form, without these mistakes."
)


@dataclass(frozen=True)
class Settled:
    """A question that will not be asked again in this run.

    Usage, dollars and requests are of its answered requests, repairs and refusals too, and not of those that
    a server failed to answer: they do not depend on the weather of a network.
    """

    status: str  # ok | quarantined | blocked
    answer: BaseModel | None  # checked and repaired; where it is not ok the last one that had the right form
    findings: list[Finding]
    usage: VlmUsage = field(default_factory=VlmUsage)
    usd: float = 0.0
    num_requests: int = 0


Check = Callable[[BaseModel], tuple[BaseModel, list[Finding]]]
Ask = Callable[[VlmRequest, Check], Awaitable[Settled]]


Reply = Callable[[int, VlmRequest], Awaitable[LedgerLine | None]]


async def settle(request: VlmRequest, check: Check, reply: Reply, num_models: int) -> Settled:
    """A question through all its turns; reply(n, request) is the ledger line of model n's reply, or None.

    Truncated: once more with twice max_tokens. Blocked: the next model. Not of the schema, or with findings
    that are errors: one repair turn, "<name>/repair", with the answer and its findings listed.
    """
    lines: list[LedgerLine] = []
    line = await _last_reply(request, reply, num_models, lines)
    answer, findings = _examine(line, request, check)
    if line is not None and line.status in ("ok", "invalid") and _errors(findings):
        repair = repair_request(request, line.text, findings)
        line = await _last_reply(repair, reply, num_models, lines)
        repaired, findings = _examine(line, request, check)
        answer = repaired if repaired is not None else answer
    usage, usd = VlmUsage(), 0.0
    for paid in lines:
        usage, usd = usage + paid.usage, usd + paid.usd
    blocked = line is not None and line.status == "blocked"
    status = "blocked" if blocked else "quarantined" if _errors(findings) else "ok"
    return Settled(status, answer, findings, usage, usd, len(lines))


def repair_request(request: VlmRequest, text: str, findings: list[Finding]) -> VlmRequest:
    problems = "\n".join(f"- {finding.detail}" for finding in _errors(findings))
    turn = REPAIR_PROMPT.format(answer=text, problems=problems)
    return replace(request, name=f"{request.name}/repair", parts=(*request.parts, turn))


def ask_ledger(ledger: ShardLedger, stage: str, prompt_ids: Iterable[str], identities: list[str]) -> Ask:
    """An ask that sends nothing: what the ledger does not hold is the finding not_asked."""

    async def reply(number: int, request: VlmRequest) -> LedgerLine | None:
        return ledger.answer(request_key(stage, prompt_ids, identities[number], request))

    async def ask(request: VlmRequest, check: Check) -> Settled:
        return await settle(request, check, reply, len(identities))

    return ask


async def _last_reply(
    request: VlmRequest, reply: Reply, num_models: int, lines: list[LedgerLine]
) -> LedgerLine | None:
    """Through the models until one does not refuse; adds what was answered on the way to `lines`."""
    line = None
    for number in range(num_models):
        line = await reply(number, request)
        if line is not None and line.status == "truncated":
            lines.append(line)
            line = await reply(number, replace(request, max_tokens=2 * request.max_tokens))
        if line is not None and line.status not in ("transient", "fatal"):
            lines.append(line)
        if line is None or line.status != "blocked":
            break
    return line


def _examine(
    line: LedgerLine | None, request: VlmRequest, check: Check
) -> tuple[BaseModel | None, list[Finding]]:
    if line is None:
        return None, [Finding("not_asked", ERROR, f"the ledger has no answer to {request.name}")]
    if line.status not in ("ok", "invalid"):
        return None, [
            Finding(line.status, ERROR, f"{line.finish}: {line.detail}" if line.detail else line.finish)
        ]
    try:
        answer = parse_answer(line.text, request.answer)
    except ValueError as error:
        return None, [Finding("invalid", ERROR, str(error))]
    return check(answer)


def _errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == ERROR]
