"""Metrics for Prometheus. A metric has vLLM's name if it means the same, so that dashboards made for vLLM show it. The
others begin with ``jllama:``."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jllama.engine.statistics import Statistics
from jllama.serve.running import Running

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
LABELS = ("model_name",)


class EngineFigures(Collector):
    """The engine's own counts, read when Prometheus asks."""

    def __init__(self, model: str, statistics: Callable[[], Statistics]) -> None:
        self._model, self._statistics = model, statistics

    def collect(self) -> Iterator[Metric]:
        """Yield one metric after the other."""
        s = self._statistics()
        used = s.pages_used / s.pages if s.pages else 0.0
        for name, text, value in (
            ("vllm:num_requests_running", "Rows that draw or whose prompts are computed.", s.running),
            ("vllm:num_requests_waiting", "Rows that wait for a slot.", s.waiting),
            ("vllm:kv_cache_usage_perc", "Used part of the cache's pages, 1 is all.", used),
        ):
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric((self._model,), value)
            yield gauge
        for name, text, value in (
            ("vllm:num_preemptions", "Rows that gave their pages back and were computed anew.", s.preemptions),
            ("vllm:prefix_cache_queries", "Tokens of prompts looked up in the cache.", s.prompt_tokens),
            ("vllm:prefix_cache_hits", "Tokens of prompts found in the cache.", s.prefix_hits),
            ("vllm:generation_tokens", "Tokens drawn.", s.new_tokens),
            ("jllama:engine_busy_seconds", "Seconds spent in the engine's steps.", s.seconds),
        ):
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric((self._model,), value)
            yield counter


class TokenGaps(Collector):
    """A histogram of the times between tokens, to which many equal ones can be added at a time."""

    def __init__(self, model: str) -> None:
        self._model, self._sum, self._counts = model, 0.0, [0] * (len(TOKEN_SECONDS) + 1)

    def add(self, seconds: float, count: int) -> None:
        """Count ``count`` tokens, each of which came ``seconds`` after the one before."""
        self._counts[bisect_left(TOKEN_SECONDS, seconds)] += count
        self._sum += seconds * count

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram."""
        text, ends = "Between two tokens of a row.", [*(str(float(end)) for end in TOKEN_SECONDS), "+Inf"]
        family = HistogramMetricFamily("vllm:inter_token_latency_seconds", text, labels=LABELS)
        buckets = [*zip(ends, accumulate(self._counts), strict=True)]
        family.add_metric((self._model,), buckets, self._sum)
        yield family


class Metrics:
    """All metrics of a server."""

    def __init__(self, model: str, statistics: Callable[[], Statistics]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(EngineFigures(model, statistics))
        self._gaps = TokenGaps(model)
        registry.register(self._gaps)
        self._model = model

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*LABELS, *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, LABELS, buckets=buckets, registry=registry)
            return made.labels(model)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts of requests that have ended.")
        self._success = counter("vllm:request_success", "Rows that have ended well.", "finished_reason")
        self._http = counter("jllama:http_requests", "HTTP requests by route and status.", "route", "status")
        self._ttft = histogram("vllm:time_to_first_token_seconds", "From a request to its first token.", SECONDS)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "From a request to its last token.", SECONDS)
        self._prompt = histogram("vllm:request_prompt_tokens", "Tokens of a request's prompts.", TOKENS)
        self._generated = histogram("vllm:request_generation_tokens", "Tokens drawn for a request.", TOKENS)
        self._n = histogram("vllm:request_params_n", "Rows of a request.", (1, 2, 5, 10, 20, 50, 100))

    def ended(self, running: Running, seconds: float) -> None:
        """Count a request whose rows have ended, or whose client has left."""
        self._prompt_tokens.labels(self._model).inc(running.prompt_tokens)
        for row in range(len(running.run.requests)):
            self._success.labels(self._model, running.finishes.get(row, "abort")).inc()
        if running.first is not None:
            self._ttft.observe(running.first - running.began)
        for gap, count in running.gaps:
            self._gaps.add(gap, count)
        self._e2e.observe(seconds)
        self._prompt.observe(running.prompt_tokens)
        self._generated.observe(running.completion_tokens)
        self._n.observe(running.run.rows)

    def answered(self, route: str, status: int) -> None:
        """Count an HTTP answer."""
        self._http.labels(self._model, route, str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
