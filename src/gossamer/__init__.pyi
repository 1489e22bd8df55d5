"""What people import: the one table of the public face, read by the package itself.

The first part holds modules, under the names they have here, the second part classes and
functions. Both are loaded when asked for.
"""

from gossamer.compression import Result as Result
from gossamer.compression import compress as compress
from gossamer.compression.recipe import Recipe as Recipe
from gossamer.compression.records import load as load
from gossamer.core.codebook import Quantized as Quantized
from gossamer.core.errors import ArgumentError as ArgumentError
from gossamer.core.errors import DatasetError as DatasetError
from gossamer.core.errors import FormatError as FormatError
from gossamer.core.errors import GossamerError as GossamerError
from gossamer.core.errors import RecipeError as RecipeError
from gossamer.core.masks import Masks as Masks
from gossamer.core.masks import keep_top as keep_top
from gossamer.core.method import Masked as Masked
from gossamer.core.method import Method as Method
from gossamer.core.quantizer import Quantizer as Quantizer
from gossamer.datasets import Dataset as Dataset
from gossamer.datasets import Split as Split
from gossamer.pack import Archive as Archive
from gossamer.pack import unpack as unpack
from gossamer.prune.dynamic import DynamicSparse as DynamicSparse
from gossamer.prune.supermask import Supermask as Supermask
from gossamer.quantize import SharedWeights as SharedWeights
from gossamer.quantize import share as share
from gossamer.quantize import share_model as share_model
from gossamer.quantize.activations import QuantizedReLU as QuantizedReLU
from gossamer.quantize.activations import quantize_activations_ as quantize_activations_
from gossamer.quantize.integer import IntegerNetwork as IntegerNetwork
from gossamer.quantize.loss_aware import LossAware as LossAware
from gossamer.quantize.lsq import LSQ as LSQ
from gossamer.quantize.network import Precision as Precision
from gossamer.quantize.network import calibrate as calibrate
from gossamer.quantize.projected import Projected as Projected
from gossamer.quantize.ttq import TTQ as TTQ
from gossamer.structure import fold_batchnorm as fold_batchnorm
from gossamer.training import TrainConfig as TrainConfig
from gossamer.training import evaluate as evaluate
from gossamer.training import soft_targets as soft_targets
from gossamer.training import train as train

__version__: str
