"""What labeling a dataset would take: requests, tokens, dollars and hours, before anything is paid."""

from data_pipeline.labeling.findings import ERROR, Finding
from data_pipeline.labeling.policy import Limits
from data_pipeline.labeling.turns import Check, Settled
from storyanchors.vlm import Vlm, VlmConfig, VlmRequest, VlmUsage

SECONDS_PER_ANSWER = 5.0  # of a model behind a network; a local one is slower


class Sampled:
    """Counts what stages would ask of a model and answers nothing."""

    def __init__(self, vlm: Vlm):
        self.vlm = vlm
        self.num_requests, self.usage, self.usd = 0, VlmUsage(), 0.0

    async def ask(self, request: VlmRequest, check: Check) -> Settled:
        usage = self.vlm.estimate(request)
        self.num_requests, self.usage = self.num_requests + 1, self.usage + usage
        self.usd += self.vlm.usd(usage)
        return Settled("quarantined", None, [Finding("not_asked", ERROR, "a dry run asks nothing")])


def describe_estimate(
    sampled: Sampled, scale: float, config: VlmConfig, limits: Limits, in_flight: int
) -> list[str]:
    """Lines for a person; scale is how many times the sample the dataset is."""
    requests, dollars = scale * sampled.num_requests, scale * sampled.usd
    sent, written = scale * sampled.usage.input_tokens, scale * sampled.usage.output_tokens
    limited = (
        (requests, limits.requests_per_minute, 60),
        (sent, limits.tokens_per_minute, 60),
        (dollars, limits.usd_per_10min, 600),
    )
    seconds = [requests * SECONDS_PER_ANSWER / in_flight]
    seconds += [amount / limit * window_s for amount, limit, window_s in limited if limit]
    prices = f"{config.input_usd_per_million:g} in and {config.output_usd_per_million:g} out per million"
    return [
        f"requests  {requests:,.0f}, without repairs",
        f"tokens    {sent:,.0f} in, at most {written:,.0f} out",
        f"dollars   at most {dollars:,.2f} ({prices}, prices of {config.price_date or 'no date'})",
        f"hours     {max(seconds) / 3600:,.2f} at {SECONDS_PER_ANSWER:g} s per answer and within the limits",
    ]
