"""What a command trains: the seam between the training loop and the kinds of run."""

from ..config import RunConfig
from ..distributed.parallel import Parallel
from ..finetuning_config import RewardConfig
from ..model.llama import Llama
from .objective import Objective, TokenLoss
from .origin import Origin
from .pair_objective import PairLoss
from .source import BatchSource, open_source


class Task:
    """Opens the data of a run and chooses what it minimises: by the class of its config."""

    def open_source(self, config: RunConfig, origin: Origin, parallel: Parallel) -> BatchSource:
        """Open the data of a run; InputError for data that cannot be read or holds too little."""
        return open_source(config, origin, parallel)

    def make_objective(self, config: RunConfig) -> Objective:
        """Return what a run minimises."""
        if isinstance(config, RewardConfig):
            return PairLoss(config.margin, config.safety_loss)
        return TokenLoss(config.optim.z_loss)

    def begin(
        self, source: BatchSource, objective: Objective, model: Llama, parallel: Parallel
    ) -> None:
        """Give source and objective the model in training, before its directory is claimed.

        Nothing, where neither needs it. Raises InputError for what else cannot be loaded.
        """
