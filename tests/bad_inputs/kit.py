"""The folder in which the commands are run: small models, rows, configurations, and a run that went well."""

import json
import shutil
from pathlib import Path

from bases import save_decoder, save_encoder, save_vision
from peftlight.cli import main

_WORDS = ("see", "again", "film", "colours", "river", "patience", "works", "nothing")
REVIEWS = "text,label\n" + "".join(f"a {word} to see again,{number % 2}\n" for number, word in enumerate(_WORDS))
TASKS = "".join(json.dumps({"instruction": f"write {word}", "output": f"{word} again"}) + "\n" for word in _WORDS)
CONFIGURATIONS = {
    "run.yaml": """\
model:
  class_path: SequenceClassification
  init_args:
    base_model: ./encoder
    strategy:
      class_path: LoRA
      init_args:
        rank: 4
data:
  class_path: TextClassification
  init_args:
    source: reviews.csv
    validation_size: 2
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
""",
    "write.yaml": """\
model:
  class_path: CausalLM
  init_args:
    base_model: ./decoder
    strategy: LoRA
data:
  class_path: Instructions
  init_args:
    source: tasks.jsonl
    validation_size: 2
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
""",
    "see.yaml": """\
model:
  class_path: ImageClassification
  init_args:
    base_model: ./vision
    strategy: LoRA
data:
  class_path: Images
  init_args:
    source: photos
    validation_size: 1
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
""",
}


def fill(folder: Path) -> None:
    """Put everything into the folder, which is the working folder; `trained` is the folder of a run."""
    for name, text in CONFIGURATIONS.items():
        (folder / name).write_text(text)
    (folder / "reviews.csv").write_text(REVIEWS)
    (folder / "tasks.jsonl").write_text(TASKS)
    save_encoder(folder / "encoder")
    save_decoder(folder / "decoder")
    save_vision(folder / "vision")
    _photos(folder / "photos")
    assert main(["fit", "--traceback", "--config=run.yaml", "--trainer.default_root_dir=made"]) == 0
    (run,) = (folder / "made").iterdir()
    shutil.move(run, folder / "trained")
    (folder / "made").rmdir()


def _photos(folder: Path) -> None:
    from PIL import Image

    for number in range(4):
        file = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number, 80, 120)).save(file)
