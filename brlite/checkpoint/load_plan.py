"""`LoadPlan`: what a backend loads. `placed_tensors`: a checkpoint's tensors, one at a time, each with its target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import msgspec

from brlite.checkpoint.checked_model import CheckedModel, quantized_formats
from brlite.checkpoint.checkpoint import Checkpoint
from brlite.checkpoint.gguf_codes import BLOCKS, CODINGS
from brlite.checkpoint.progress import OnProgress
from brlite.checkpoint.quantization import FOLDER_FORMS
from brlite.checkpoint.stored_tensor import F32, PLAIN_FORMATS, StoredTensor
from brlite.config.options import EngineConfig, ModelSpec
from brlite.models.config import QUANTIZATION_GROUP, ModelConfig
from brlite.models.families.family import WeightTarget
from brlite.models.network import MatrixPart, Parameter
from brlite.models.precision import INT4_FORMS, PRECISIONS, MatrixForm, Precision, name_of
from brlite.models.shards import LANES, Shard, rank_parameters, shard_config, shard_slices

READING = "reading the weights"  # a stage of a load


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All that a backend needs to load a model, decided before any weight is read.

    `checkpoint` is open, and `check_model` has made `model` of it. With a `shard` one rank's part is loaded. Native
    code maps `packed_file`, or writes it if it is missing. `notes` are added to those of the backend's `info`.
    """

    checkpoint: Checkpoint
    model: CheckedModel
    spec: ModelSpec
    engine: EngineConfig
    num_threads: int = 1
    shard: Shard | None = None
    packed_file: Path | None = None
    on_progress: OnProgress | None = None
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> ModelConfig:
        """The config of the whole model, also with a shard."""
        return self.model.config

    @property
    def rank_config(self) -> ModelConfig:
        """The config of the shard's part; without a shard that of the whole model."""
        return self.config if self.shard is None else shard_config(self.config, self.shard)

    @property
    def precision(self) -> Precision:
        return self.model.precision

    @property
    def card_forms(self) -> Mapping[str, MatrixForm]:
        """The forms in which torch holds matrices on a card, of a shard as its rank holds them."""
        return card_forms(self.model, self.shard)

    @property
    def precision_name(self) -> str:
        """The name of the precision that native code computes in: see `precision_name_of`."""
        parts = matrix_parts(self.model, self.shard).values()
        return self.precision_name_of({part.form for each in parts for part in each})

    def precision_name_of(self, forms: Collection[MatrixForm]) -> str:
        """The name of the precision with matrices of these forms: the spec's, or that of a quantized file's codes."""
        if self.precision.weights != "stored":
            return name_of(self.precision)
        if not forms:
            return "bf16" if self.spec.precision == "auto" else self.spec.precision
        activations = "a_int8" if self.precision.has_int8_activations else "a_bf16"
        num_bits = 4 if INT4_FORMS.intersection(forms) else 6 if "q6_k" in forms else 8
        return f"{activations}_w_int{num_bits}"

    def report(self, fraction: float, stage: str = READING) -> None:
        """Report which fraction of `stage` is done, 0 to 1, if there is a callback."""
        if self.on_progress is not None:
            self.on_progress(stage, fraction)


NOT_QUANTIZED = F32.name
KEPT, ROUNDED_TO_INT8, ROUNDED_TO_INT4, WIDENED = "kept", "rounded to int8", "rounded to 4 bits", "widened to bfloat16"
# A quantized format → the form in memory that keeps its codes, in torch and in native code. Others are not listed.
CARD_FORMS: dict[str, MatrixForm] = {name: coding.form for name, coding in CODINGS.items()} | FOLDER_FORMS
NATIVE_FORMS = CARD_FORMS | {name: block.form for name, block in BLOCKS.items()}
StoredPart = tuple[range, range | None] | None  # rows and columns of a checkpoint's tensor; None for all of it


def placed_tensors(plan: LoadPlan, stage: str = READING) -> Iterator[tuple[WeightTarget, StoredTensor]]:
    """Yields every tensor of the checkpoint that the model uses, with its target. Its bytes have not been read yet.

    With a shard, yields only the parts that the rank holds, with their targets in the rank's own parameters. Reports
    the fraction that is done after each of them.
    """
    targets = held_targets(plan.model, plan.shard)
    total = sum(math.prod(target.shape) for parts in targets.values() for _, target in parts)
    num_placed = 0
    for tensor in plan.checkpoint.tensors():
        for part, target in targets.get(tensor.name, ()):
            placed = tensor if part is None else tensor.part(*part)
            if target.has_unit_rows:
                placed = msgspec.structs.replace(placed, has_unit_rows=True)
            yield target, placed
            del placed
            num_placed += math.prod(target.shape)
            plan.report(num_placed / total, stage)
        del tensor  # its bytes may be in memory: free them before the next one is read


def num_cache_blocks(spec: ModelSpec, block_size: int) -> int:
    """The blocks of the KV cache: as configured, else enough for `build_batch` sequences of full length."""
    return spec.num_blocks or spec.build_batch * math.ceil(spec.build_seq / block_size)


def held_parameters(model: CheckedModel, shard: Shard | None) -> Mapping[str, Parameter]:
    """The decoder's parameters; with a shard, the rank's parts of them."""
    return model.parameters if shard is None else rank_parameters(model.config, shard)


def held_targets(model: CheckedModel, shard: Shard | None) -> dict[str, list[tuple[StoredPart, WeightTarget]]]:
    """For each tensor of the checkpoint: the parts that a rank holds, each with its target in the rank's parameters."""
    if shard is None:
        return {name: [(None, target)] for name, target in model.targets.items()}
    slices = shard_slices(model.config, shard)
    targets: dict[str, list[tuple[StoredPart, WeightTarget]]] = {name: [] for name in model.targets}
    for name, target in model.targets.items():
        held, num_before = slices[target.parameter], 0
        for rows in held.rows:
            first, stop = max(rows.start, target.start), min(rows.stop, target.start + target.shape[0])
            if first < stop:
                shape = (stop - first, *(target.shape[1:] if held.columns is None else [len(held.columns)]))
                own = WeightTarget(target.parameter, shape, num_before + first - rows.start, target.has_unit_rows)
                part = range(first - target.start, stop - target.start), held.columns
                targets[name].append((part, own))
            num_before += len(rows)
    return targets


def matrix_parts(model: CheckedModel, shard: Shard | None = None) -> dict[str, tuple[MatrixPart, ...]]:
    """For each matrix that native code multiplies by, or keeps quantized for look-up: its parts, each of one form."""
    parameters, weights = held_parameters(model, shard), model.precision.weights
    if weights in ("bfloat16", "int8"):
        rounded: MatrixForm = "int8" if weights == "int8" else "bfloat16"
        matrices = {name: parameter for name, parameter in parameters.items() if parameter.precision == "weights"}
        return {name: (MatrixPart(rounded, parameter.shape[0]),) for name, parameter in matrices.items()}
    found: dict[str, list[tuple[int, MatrixPart]]] = {}
    for name, parts in held_targets(model, shard).items():
        stored_as = model.formats.get(name, NOT_QUANTIZED)
        for _, target in parts:
            parameter = parameters[target.parameter]
            is_quantized = len(parameter.shape) == 2 and stored_as not in PLAIN_FORMATS
            # An embedding that is only looked up is a bfloat16 table, unless the file quantizes it.
            if parameter.precision == "weights" or is_quantized:
                form: MatrixForm = "int8" if target.has_unit_rows else NATIVE_FORMS.get(stored_as, "int8")
                if weights == "int4" and form not in INT4_FORMS and parameter.sharding != "vocabulary":
                    form = "int4_min"
                part = MatrixPart(form, target.shape[0])
                found.setdefault(target.parameter, []).append((target.start, part))
    return {name: _joined([part for _, part in sorted(parts)]) for name, parts in found.items()}


def card_forms(model: CheckedModel, shard: Shard | None = None) -> dict[str, MatrixForm]:
    """The form of each matrix that torch does not widen on a card, by its name. Embeddings are always widened.

    A matrix of tensors in several forms becomes int8. One whose inputs a rank cuts within a group is widened.
    """
    parameters = held_parameters(model, shard)
    matrices = [name for name, each in parameters.items() if each.precision == "weights" and not each.is_looked_up]
    if model.precision.weights != "stored":
        return dict.fromkeys(matrices, "int8") if model.precision.weights == "int8" else {}
    found: dict[str, set[MatrixForm]] = {name: set() for name in matrices}
    for name, parts in held_targets(model, shard).items():
        kept = CARD_FORMS.get(model.formats.get(name, NOT_QUANTIZED), "int8")
        for part, target in parts:
            columns = None if part is None else part[1]
            if columns is not None and (columns.start % QUANTIZATION_GROUP or columns.stop % QUANTIZATION_GROUP):
                found.pop(target.parameter, None)
            elif target.parameter in found:
                found[target.parameter].add("int8" if target.has_unit_rows else kept)
    return {name: forms.pop() if len(forms) == 1 else "int8" for name, forms in found.items()}


def describe_precision(model: CheckedModel, spec: ModelSpec, *, is_native: bool, keeps_forms: bool = True) -> str:
    """For the log: the precision that is served, what decided it, and what becomes of each quantized format.

    `keeps_forms` says whether the backend has forms for quantized files, as native code always has.
    """
    weights, set_by_precision = model.precision.weights, f"{spec.precision}, set by precision"
    if spec.precision != "auto" and weights in ("bfloat16", "int8"):
        return set_by_precision
    quantized = quantized_formats(model.formats)
    if not quantized and weights == "int4":
        return set_by_precision
    if not quantized and model.precision != PRECISIONS["bf16"]:
        return f"{name_of(model.precision)}, which the bundle was made for (auto)"
    if not quantized:
        return "bf16, as no matrix of the files is quantized (auto)"
    if not keeps_forms:
        return f"bf16: torch widens the file's {', '.join(quantized)} (auto)"
    matrices = _stored_matrices(model, spec.tensor_parallel, is_native=is_native)
    uses = []
    for stored_as in sorted(matrices, key=[*quantized, *sorted(PLAIN_FORMATS)].index):
        names = matrices[stored_as]
        changes = {change: len(changed) for change, changed in names.items() if change != KEPT}
        count = len(set().union(*names.values()))
        if not changes or count in changes.values():
            uses.append(f"{stored_as} is {next(iter(changes), KEPT)}")
        else:
            parts = [f"{change} in {number} of {count} matrices" for change, number in changes.items()]
            uses.append(f"{stored_as} is {' and '.join(parts)}{', else kept' if sum(changes.values()) < count else ''}")
    decided_by = "auto" if spec.precision == "auto" else set_by_precision
    return f"the file's own: {', '.join(uses)} ({decided_by})"


def _stored_matrices(model: CheckedModel, num_ranks: int, *, is_native: bool) -> dict[str, dict[str, set[str]]]:
    """By format: the checkpoint's matrices that are kept, rounded or widened, on any rank."""
    found: dict[str, dict[str, set[str]]] = {}
    ranks = [Shard(rank, num_ranks, sums=not is_native) for rank in range(num_ranks)]
    for shard in ranks if num_ranks > 1 else (None,):
        held = matrix_parts(model, shard) if is_native else card_forms(model, shard)
        for name, parts in held_targets(model, shard).items():
            stored_as = model.formats.get(name, NOT_QUANTIZED)
            for _, target in parts:
                form = held.get(target.parameter)
                if isinstance(form, tuple):
                    ends = itertools.accumulate(part.num_rows for part in form)
                    form = next(part.form for part, end in zip(form, ends, strict=True) if target.start < end)
                if form is None and (is_native or stored_as in PLAIN_FORMATS):
                    continue  # a vector, or an embedding that no format quantizes
                is_kept = form == (NATIVE_FORMS if is_native else CARD_FORMS).get(stored_as)
                rounded = ROUNDED_TO_INT4 if form in INT4_FORMS else ROUNDED_TO_INT8
                change = WIDENED if form is None else KEPT if is_kept else rounded
                found.setdefault(stored_as, {}).setdefault(change, set()).add(name)
    return found


def _joined(parts: list[MatrixPart]) -> tuple[MatrixPart, ...]:
    """Join neighbours of one form. If a border lies within a panel, which has one form, the whole matrix is int8."""
    joined: list[MatrixPart] = []
    for part in parts:
        if joined and joined[-1].form == part.form:
            part = MatrixPart(part.form, joined.pop().num_rows + part.num_rows)
        joined.append(part)
    if any(part.num_rows % LANES for part in joined[:-1]):
        return (MatrixPart("int8", sum(part.num_rows for part in joined)),)
    return tuple(joined)
