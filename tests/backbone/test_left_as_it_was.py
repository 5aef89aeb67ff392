"""A call that is refused, wherever in it, leaves every module, hook, flag and configuration as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import meft
from meft.backbone.refusal import as_it_was_if_refused
from meft.errors import ConfigError, MeftError, MeftWarning, UnsupportedModelError
from meft.methods.registry import apply_method
from support import models
from support.peft_helpers import batch_of, llama


def everything(model: nn.Module) -> dict[str, Any]:
    """What `model` is made of: identities of modules, tensors and hooks, flags, classes and configurations."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            found[f"{name}.{attribute}"] = _shown(value)
        found[f"{name}:class"] = type(module)
    for name, parameter in model.named_parameters():
        found[f"{name}:parameter"] = (id(parameter), parameter.requires_grad, parameter.dtype)
    found["config"] = {name: _shown(value) for name, value in vars(model.config).items()}  # type: ignore[union-attr]
    return found


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shown(entry) for key, entry in value.items()}
    return id(value) if isinstance(value, nn.Module | Tensor) or callable(value) else repr(value)


def bert(task: str = "SEQ_CLS") -> Any:
    return models.build("bert", task, layers=3)


def bart() -> Any:
    model = models.build("bart", "SEQ_CLS", layers=2)
    model.config.encoder_layerdrop = model.model.encoder.layerdrop = 0.1
    return model


def wrapped() -> Any:
    model = bert()
    for index, layer in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[index] = checkpoint_wrapper(layer)
    return model


def meft_model() -> Any:
    return get_peft_model(bert(), meft.MeftConfig(task_type="SEQ_CLS"))


def adapter(task_type: str | None = "SEQ_CLS", name: str = "default", **options: Any) -> Callable[[Any], Any]:
    def put(model: Any) -> None:
        config = meft.MeftConfig(task_type=task_type, **options)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            get_peft_model(model, config, adapter_name=name)

    return put


def reversible(**options: Any) -> Callable[[Any], Any]:
    return lambda model: meft.make_reversible(model, **options)


def method(name: str, task: str = "SEQ_CLS", **options: Any) -> Callable[[Any], Any]:
    return lambda model: apply_method(model, name, task_type=task, **options)


REFUSED: list[tuple[Callable[[], Any], Callable[[Any], Any], str]] = [
    (
        bert,
        adapter(modules_to_save=["nothing"]),
        r"names 'nothing', but \w+ has no such module. Its modules are bert, ",
    ),
    (bert, adapter(modules_to_save=["pool"]), r"names 'pool', .* Did you mean 'pooler'\?"),
    (bert, adapter(modules_to_save=["classifier.weight"]), "has no such module"),
    (bert, adapter(None, modules_to_save=["score"]), "names 'score', but"),
    (bert, adapter(modules_to_save=["dropout"]), r"'dropout' is the end of the names of MEFT's own modules"),
    (bert, adapter(modules_to_save=["f_down"]), r"'f_down' is the end of the names of MEFT's own modules"),
    (bert, adapter(modules_to_save=["encoder"]), "a module of which a MEFT layer consists cannot be copied aside"),
    (bert, adapter(stacks=["nothing"]), r"has the stacks \['bert\.encoder\.layer'\]"),
    (bert, adapter(feedforward_module="nothing"), "Its children are attention, intermediate, output"),
    (bert, adapter(frozen_layers=99), "Use at most frozen_layers=2"),
    (lambda: bert("FEATURE_EXTRACTION"), adapter("CAUSAL_LM"), r"task_type='CAUSAL_LM' is for models that generate"),
    (lambda: bert("FEATURE_EXTRACTION"), adapter("SEQ_2_SEQ_LM"), "is for models that generate, and BertModel does"),
    (bert, adapter(name="a.b"), r"adapter_name='a\.b' cannot be the name of a module"),
    (bert, adapter(name="forward"), "adapter_name='forward' cannot be"),
    (bert, adapter(name="keys"), "adapter_name='keys' cannot be"),
    (meft_model, adapter(name="a.b", coupling="momentum"), "adapter_name="),
    (meft_model, adapter(name="b", modules_to_save=["nothing"]), "has no such module"),
    (meft_model, reversible(), "has a MEFT adapter, which makes it reversible already"),
    (meft_model, meft.restore, "nothing to restore"),
    (bert, reversible(stacks=["nothing"]), "has the stacks"),
    (bert, reversible(cached_layers=99), "Their sum must be at most 3"),
    (bert, method("lora", modules_to_save=["nothing"]), "names 'nothing'"),
    (bert, method("ia3", modules_to_save=["nothing"]), "names 'nothing'"),
    (bert, method("bitfit", modules_to_save=["nothing"]), "names 'nothing'"),
    (bert, method("lora+momentum", modules_to_save=["nothing"]), "names 'nothing'"),
    (bert, method("lora", modules_to_save=["layer"]), r"is bert\.encoder\.layer of .*, a ModuleList"),
    (llama, method("bitfit", "CAUSAL_LM"), "has no biases outside of its task head"),
    (bert, method("full+meft3", gamma=0.5), "gamma"),
]


@pytest.mark.parametrize(("make", "call", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_what_is_refused_leaves_the_model_as_it_was(
    make: Callable[[], Any], call: Callable[[Any], Any], message: str
) -> None:
    model = make()
    before = everything(model)
    with pytest.raises(MeftError, match=message) as caught:
        call(model)
    assert isinstance(caught.value, ConfigError | UnsupportedModelError)
    assert everything(model) == before


@pytest.mark.parametrize("call", [reversible(), adapter()], ids=["make_reversible", "get_peft_model"])
@pytest.mark.parametrize("make", [bart, wrapped])
def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was(
    make: Callable[[], Any], call: Callable[[Any], Any]
) -> None:
    model = make()
    before = everything(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MeftWarning):
            call(model)
    assert everything(model) == before


def test_hooks_can_be_removed_after_a_refusal() -> None:
    model = bert()
    handle = model.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="halfway"), as_it_was_if_refused(model):
        model.register_forward_hook(lambda *_: None)
        model.bert.encoder.layer[0] = nn.Identity()
        model.requires_grad_(False).eval()
        model.config.hidden_size = 1
        model.__class__ = type("Other", (type(model),), {})
        raise RuntimeError("halfway")
    handle.remove()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert type(model).__name__ == "BertForSequenceClassification" and model.config.hidden_size > 1
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(**batch_of("bert")).loss.requires_grad


@pytest.mark.parametrize("options", [{"model": "x"}, {"optimizer": "x"}, {"device": "mps"}])
def test_measure_runs_nothing_that_it_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        meft.measure(lambda: pytest.fail("was run"), **options)
