"""The one training loop: keyed shuffling, schedules, averaged weights, checkpoints, and an exact resume after a kill.

What is trained for is a `Loss` or a `robust.recipe.Recipe`. Every number the loop draws is a function of
(seed, epoch, sample) or (seed, step), so that a run that was killed and resumed ends, on a CPU, with the same
bits as one that was not.
"""

from __future__ import annotations
