"""Bad configurations: YAML files, keys, classes, values, and what does not go together."""

from bad_inputs.row import Row, row

_OVER = "fit --config run.yaml --config over.yaml"
_ONE = "trainer:\n  callbacks:\n    - class_path: LearningRateMonitor\n"
_DOUBLING = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


def _option(name: str, options: str, *says: str) -> Row:
    return row(name, f"fit --config run.yaml {options}", *says)


def _over(name: str, text: str, *says: str) -> Row:
    """A second file that changes the good one."""
    return row(name, _OVER, *says, files={"over.yaml": text})


def _of_strategy(text: str) -> str:
    return f"model:\n  init_args:\n    strategy:\n      {text}"


COMMAND = [
    row("a command that there is not", "train --config run.yaml", "no command 'train'", "fit, validate"),
    row("a command misspelt", "evalute trained", "no command 'evalute'", "'evaluate'"),
    row(
        "an option before the command", "--config run.yaml", "A command comes first", "peftlight fit --config run.yaml"
    ),
    row("no configuration", "fit", "needs model and data", "--config FILE", "SequenceClassification", "Alpaca"),
    row("a word for an option", "fit run.yaml", "'run.yaml' belongs to no option", "--KEY VALUE"),
    row("a command without its adapter", "evaluate", "needs ADAPTERS", "peftlight evaluate --help"),
    row("an option misspelt", "evaluate trained --splitt test", "--splitt", "'--split'"),
    row("a choice that an option has not", "evaluate trained --split train", "'train'", "validation, test"),
    row("a number of rows below one", "evaluate trained --limit 0", "--limit", "at least 1", "it is 0"),
    row("an option for what stands alone", "merge trained --out encoder", "'--out", "peftlight merge ADAPTER OUT"),
]

FILES = [
    row("a file that is not there", "fit --config runn.yaml", "no file runn.yaml", "'run.yaml'"),
    row("a folder for a file", "fit --config encoder", "encoder is a folder"),
    _over("an empty file", "", "over.yaml is empty", "model, data and trainer"),
    _over("comments alone", "# nothing yet\n", "over.yaml is empty", "model, data and trainer"),
    _over("a list for keys", "- model\n- data\n", "over.yaml:1", "a list", "model, data and trainer"),
    _over("a text for keys", "trainer\n", "over.yaml:1", "a single text", "model, data and trainer"),
    _over("a tab in the indentation", "trainer:\n\tmax_epochs: 3\n", "over.yaml:2", "a tab", "spaces"),
    _over("a bracket that stays open", "trainer: {max_epochs: 3\n", "over.yaml:2", "not YAML", "from line 1"),
    _over("a wrong indentation", "trainer:\n  max_epochs: 3\n    devices: 1\n", "over.yaml:3", "check the indentation"),
    _over("a key given twice", "trainer:\n  max_epochs: 3\n  max_epochs: 4\n", "over.yaml:3", "twice", "line 2"),
    _over("two documents", "trainer: {max_epochs: 3}\n---\ntrainer: {}\n", "over.yaml:2", "second document"),
    _over("an anchor that holds itself", "trainer: &a\n  callbacks: *a\n", "over.yaml:1", "an alias to itself"),
    _over("anchors that double and double", _DOUBLING, "over.yaml:16", "aliases written out", "100000"),
    _over("brackets without end", "trainer: " + "[" * 100_000, "over.yaml:1", "more than 50 deep"),
    _over("an alias without an anchor", "trainer: *nowhere\n", "over.yaml:1", "not YAML", "*nowhere"),
    _over(
        "a tag of Python", "trainer: !!python/object/apply:os.system [ls]\n", "over.yaml:1", "!!os.system", "not read"
    ),
    _over(
        "a tag of another program", "trainer:\n  accelerator: !env HOME\n", "over.yaml:2", "!env", "the value itself"
    ),
    _over("a placeholder", "data:\n  init_args:\n    batch_size: ${SIZE}\n", "over.yaml:3", "whole number", "${SIZE}"),
    row("a file that is not UTF-8", _OVER, "over.yaml:2", "not UTF-8", files={"over.yaml": b"trainer:\n  # \xe9\n"}),
    row("a binary file", "fit --config encoder/model.safetensors", "model.safetensors:1", "not UTF-8"),
]

KEYS = [
    _over("a misspelt key", "modle: CausalLM\n", "over.yaml:1", "'modle'", "'model'"),
    _over("a misspelt key that holds nothing", "modle: {}\n", "over.yaml:1", "'modle'", "'model'"),
    _over("a misspelt key of a class that holds nothing", _of_strategy("init_args:\n        rnk: {}\n"), "'rank'"),
    _over("a section of comments alone", "trainer:\n#  max_epochs: 3\n", "over.yaml:1", "'trainer' is empty"),
    _over("an option of the command line in a file", "resume: trained\n", "over.yaml:1", "peftlight fit --resume"),
    _over("a misspelt key of the trainer", "trainer:\n  max_epoch: 3\n", "over.yaml:2", "'max_epoch'", "'max_epochs'"),
    _over("a misspelt field", _of_strategy("init_args:\n        rnk: 4\n"), "over.yaml:5", "no 'rnk'", "'rank'"),
    _over(
        "a field of another strategy",
        _of_strategy("class_path: BitFit\n      init_args:\n        rank: 4\n"),
        "over.yaml:6",
        "BitFit has no 'rank'",
        "It takes biases",
    ),
    _over(
        "a key one level too high", "model:\n  rank: 8\n", "over.yaml:2", "belongs under 'model: init_args: strategy"
    ),
    _over("the optimizer inside the model", "model:\n  init_args:\n    optimizer: SGD\n", "over.yaml:3", "top level"),
    _option("a misspelt option", "--trainer.max_epocs 3", "--trainer.max_epocs", "'max_epochs'"),
    _option("another framework's name", "--learning_rate 1e-4", "no key 'learning_rate'", "--optimizer.lr"),
    _option("an option without its value", "--data.batch_size", "--data.batch_size", "a value is missing"),
    row("no model", "fit --data SST2 --data.source reviews.csv", "needs model", "SequenceClassification"),
    row(
        "no data",
        "fit --model SequenceClassification --model.base_model ./encoder --model.strategy LoRA",
        "needs data",
        "Alpaca",
    ),
    row(
        "no base",
        "fit --model CausalLM --model.strategy LoRA --data SST2 --data.source reviews.csv",
        "CausalLM needs model.base_model",
    ),
    row(
        "no strategy",
        "fit --model CausalLM --model.base_model ./decoder --data SST2 --data.source reviews.csv",
        "CausalLM needs model.strategy",
        "LoRA",
        "your own class",
    ),
]

CLASSES = [
    _option("no such strategy", "--model.strategy LoRa", "no class 'LoRa'", "'LoRA'", "my_module.MyClass"),
    _option("no such task", "--model SequenceClasification", "--model", "'SequenceClassification'"),
    _option("no such data", "--data SST3", "--data", "no class 'SST3'", "'SST2'"),
    _option("no such optimizer", "--optimizer AdamV", "--optimizer", "no class 'AdamV'", "'Adam'"),
    _option("no such schedule", "--lr_scheduler Cosine", "--lr_scheduler", "no class 'Cosine'", "CosineAnnealingLR"),
    _option("no such callback", "--trainer.callbacks EarlyStoping", "--trainer.callbacks", "'EarlyStopping'"),
    _option(
        "no such module", "--model.strategy my_methods.Mine", "no module 'my_methods'", "--import FOLDER/my_methods.py"
    ),
    row(
        "a file in place of a class",
        "fit --config run.yaml --model.strategy ./my_methods.py",
        "name the class in it: --model.strategy my_methods.CLASS",
        files={"my_methods.py": "open('it_ran', 'w')"},
    ),
    _option("another kind of class", "--model.strategy torch.nn.Linear", "is not a PEFTStrategy", "LoRA"),
    row(
        "a module that fails",
        "fit --config run.yaml --model.strategy failing_methods.Mine",
        "failing_methods.Mine is found",
        "RuntimeError: no licence",
        "failing_methods.py:1",
        files={"failing_methods.py": "raise RuntimeError('no licence')\n"},
    ),
    _over("two classes of data", "data:\n  - class_path: SST2\n  - class_path: Alpaca\n", "over.yaml:1", "dashes"),
    _option(
        "data of another task",
        "--data Instructions --data.source tasks.jsonl",
        "Instructions makes the rows of CausalLM",
        "SequenceClassification",
        "TextClassification",
    ),
    _option(
        "a metric that there is not",
        "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val_acuracy",
        "--trainer.callbacks.monitor",
        "no metric 'val_acuracy'",
        "'val_accuracy'",
        "val_loss",
    ),
    _over(
        "an average of ranks that are cut",
        f"{_of_strategy('class_path: AdaLoRA')}\ntrainer:\n  callbacks: [{{class_path: EMAWeightAveraging}}]\n",
        "EMAWeightAveraging does not go with AdaLoRA",
        "another strategy",
    ),
    row(
        "callbacks that would replace others",
        "fit --config run.yaml --config one.yaml --config two.yaml",
        "two.yaml:2",
        "would replace the callbacks of one.yaml:2",
        "callbacks+",
        files={"one.yaml": _ONE, "two.yaml": _ONE},
    ),
    row(
        "an option's callbacks that would replace others",
        "fit --config run.yaml --config one.yaml --trainer.callbacks DeviceStatsMonitor",
        "--trainer.callbacks",
        "would replace the callbacks of one.yaml:2",
        "callbacks+",
        files={"one.yaml": _ONE},
    ),
]

VALUES = [
    _over(
        "a word for a number", "optimizer:\n  class_path: AdamW\n  init_args:\n    lr: fast\n", "over.yaml:4", "'fast'"
    ),
    _over("a fraction", "data:\n  init_args:\n    batch_size: 8.5\n", "over.yaml:3", "a whole number", "'8.5'"),
    _over("a comma", "optimizer:\n  class_path: AdamW\n  init_args:\n    lr: 0,001\n", "over.yaml:4", "'0,001'"),
    _over("a list for a text", "data:\n  init_args:\n    source: [a.csv, b.csv]\n", "over.yaml:3", "must be text"),
    _over("words that YAML reads as no text", "data:\n  init_args:\n    labels: [no, yes]\n", "In quotes it is text"),
    _over("nothing for a number", "data:\n  init_args:\n    batch_size:\n", "over.yaml:3", "whole number", "is empty"),
    _option("a learning rate below zero", "--optimizer.lr -0.1", "optimizer", "refuses its settings", "-0.1"),
    _option(
        "a learning rate for a name that is not there",
        "--model.learning_rates '{clasifier: 0.1}'",
        "'clasifier' fits no parameter that trains",
        "'classifier'",
    ),
    _option(
        "a schedule of rate zero",
        "--lr_scheduler ConstantLR --lr_scheduler.factor 0",
        "Nothing was trained",
        "The learning rate was 0 in every step, by ConstantLR",
        "--lr_scheduler LinearWarmup",
    ),
    _option(
        "a schedule over too few steps",
        "--trainer.max_epochs 3 --lr_scheduler.total_steps 2",
        "LinearWarmup's total_steps is 2, and the training has 3 steps",
        "leave it out",
    ),
    _option("an optimizer of sparse gradients", "--optimizer SparseAdam", "SparseAdam cannot take a step", "dense"),
    _option("an optimizer of matrices", "--optimizer Muon", "--optimizer MuonAndAdamW"),
    _option("a learning rate in letters", "--optimizer.lr nan", "--optimizer.lr", "a number", "'nan'"),
    _option("a rank of zero", "--model.strategy.rank 0", "--model.strategy.rank", "at least 1", "rank is 0"),
    _option("a rank above the layer's", "--model.strategy.rank 64", "at most 32", "Set rank to 32 or below"),
    _option("an alpha below zero", "--model.strategy.alpha -1", "--model.strategy.alpha", "above 0", "-1.0"),
    _option("a dropout above one", "--model.strategy.dropout 1.5", "--model.strategy.dropout", "share", "1.5"),
    _option(
        "no such start", "--model.strategy.init_lora_weights pisa", "--model.strategy.init_lora_weights", "'pissa'"
    ),
    _option(
        "targets that match nothing", "--model.strategy.target_modules '[querry]'", "'querry'", "'query'", "key (2)"
    ),
    _option(
        "targets that are no pattern", "--model.strategy.target_modules '(query'", "'(query'", "regular expression"
    ),
    _option("layers that are not there", "--model.strategy.layers 7-9", "'7-9'", "2 layers", "starts at 0"),
    _option("no such number format", "--model.dtype float31", "--model.dtype", "'float31'", "'float32'"),
    _option("no such precision", "--trainer.precision 17", "--trainer.precision", "bf16-mixed", "'17'"),
    _option(
        "no accumulation", "--trainer.accumulate_grad_batches 0", "--trainer.accumulate_grad_batches", "at least 1"
    ),
    _option("epochs below zero", "--trainer.max_epochs -5", "--trainer.max_epochs", "-5"),
    _option("no step", "--trainer.max_steps 0", "--trainer.max_steps", "nothing would be trained"),
    _option("no epoch", "--trainer.max_epochs 0", "--trainer.max_epochs", "nothing would be trained"),
    _option("a seed in words", "--seed_everything tuesday", "--seed_everything", "a whole number", "'tuesday'"),
    _option("a seed too large", "--seed_everything 99999999999", "--seed_everything", "99999999999", "4294967295"),
    _option("no device", "--trainer.devices 0", "--trainer.devices", "'0'"),
    _option("no such accelerator", "--trainer.accelerator gpuu", "--trainer.accelerator", "'gpuu'", "cuda"),
    _option("no such way to distribute", "--trainer.strategy dddp", "--trainer.strategy", "'dddp'", "'ddp'"),
    _option("half a way to distribute", "--trainer.strategy fsd", "--trainer.strategy", "Did you mean 'fsdp2'?"),
    _option("a clip below zero", "--trainer.gradient_clip_val -1", "--trainer.gradient_clip_val", "at least 0", "-1"),
    _option("batches above one", "--trainer.limit_train_batches 1.5", "--trainer.limit_train_batches", "1.5"),
    _option("a batch of no row", "--data.batch_size 0", "--data.batch_size", "at least 1", "it is 0"),
    _option("a share above one", "--data.validation_size 1.5", "--data.validation_size", "between 0 and 1", "1.5"),
    _option("a warm-up above one", "--lr_scheduler LinearWarmup --lr_scheduler.warmup 1.5", "from 0 to 1", "1.5"),
    _option("one label alone", "--data.labels '[good]'", "labels", "two different names", "['good']"),
    _option("no such bits", "--trainer.callbacks+=Quantize --trainer.callbacks.bits=3", "bits", "one of 4, 8", "'3'"),
    _option("a checkpoint that is not there", "--ckpt_path nowhere.ckpt", "nowhere.ckpt"),
    _option("an empty name for a checkpoint", "--ckpt_path ''", "ckpt_path is an empty text"),
    _option("an adapter for a checkpoint", "--ckpt_path trained/adapter", "folder of an adapter"),
    _option("a configuration for a checkpoint", "--ckpt_path run.yaml", "run.yaml is no checkpoint"),
]
ROWS = [*COMMAND, *FILES, *KEYS, *CLASSES, *VALUES]
