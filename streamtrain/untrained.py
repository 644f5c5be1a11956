"""Parameters that require gradients and that no optimizer updates; its law: they are never found by surprise.

An optimizer knows the parameters that it was made with (`torch.optim.Optimizer`): layers that are replaced, weights
that are assigned (`load_state_dict(..., assign=True)`) and what is unfrozen later are strangers to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from streamtrain.errors import ConfigError

logger = logging.getLogger(__name__)
SHOWN = 4


class Untrained:
    """What an optimizer leaves out of a model: at first of the user's own will, which is said, later by mistake."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, frozen: Iterable[nn.Parameter] = ()) -> None:
        """The optimizer was just made of the model, or given for it; `frozen`: for good, whoever wakes them between."""
        self._model, self._optimizer = model, optimizer
        left = self._left()
        self._known = {*left, *map(id, frozen)}
        if left:
            logger.warning("the optimizer leaves out, and nothing trains: %s", _listed(list(left.values())))
        if strangers := self._strangers():
            logger.warning(
                "the optimizer holds parameters that are none of the model's, of the shapes %s: no checkpoint has what "
                "they learn. Make them a part of the model before: model.scale = nn.Parameter(...)",
                _listed(strangers),
            )

    def refuse(self) -> None:
        """A fit begins. Raises ConfigError for parameters that came since."""
        if new := self._new():
            raise ConfigError(
                f"the optimizer does not hold {_listed(new)}, which would not be trained: the model was changed since "
                "it was made",
                hint="Hand the changed model to a new one; what is trained later goes by freeze={regex: '2epochs'}.",
            )

    def tell(self) -> None:
        """Say once which came while it is trained; on the train thread."""
        if new := self._new():
            self._known |= set(self._left())
            logger.warning(
                "%s requires gradients now, and is in no optimizer: it is not trained before it is given to one "
                "(optimizer.add_param_group), or goes by freeze={regex: '2epochs'} from the start; what forward makes "
                "when it is first called is to be there when the optimizer is made",
                _listed(new),
            )

    def _strangers(self) -> list[str]:
        """The shapes of what it holds that is not of the model."""
        own = set(map(id, self._model.parameters()))
        held = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return [str(list(parameter.shape)) for parameter in held if id(parameter) not in own]

    def _new(self) -> list[str]:
        return [name for key, name in self._left().items() if key not in self._known]

    def _left(self) -> dict[int, str]:
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        named = self._model.named_parameters()
        return {id(p): name for name, p in named if p.requires_grad and id(p) not in held}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
