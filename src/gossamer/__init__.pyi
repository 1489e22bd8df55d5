"""What people import: the one table of the public face, read by the package itself.

The first part holds modules, under the names they have here, the second part classes and
functions. Both are loaded when asked for.
"""

from gossamer import analysis as analysis
from gossamer import datasets as datasets
from gossamer import distribute as distribute
from gossamer import experiments as experiments
from gossamer import nets as nets
from gossamer import pack as pack
from gossamer import prune as prune
from gossamer import quantize as quantize
from gossamer import report as report
from gossamer import runtime as runtime
from gossamer import structure as structure
from gossamer import training as training
from gossamer.analysis.look import Look as Look
from gossamer.analysis.look import look as look
from gossamer.compression import Result as Result
from gossamer.compression import compress as compress
from gossamer.compression import progress as progress
from gossamer.compression import recipe as recipe
from gossamer.compression.compiled import compile as compile
from gossamer.compression.recipe import Recipe as Recipe
from gossamer.compression.records import load as load
from gossamer.core import budgets as budgets
from gossamer.core import codebook as codebook
from gossamer.core import errors as errors
from gossamer.core import masks as masks
from gossamer.core import method as method
from gossamer.core import names as names
from gossamer.core import quantizer as quantizer
from gossamer.core import reallocation as reallocation
from gossamer.core import schedules as schedule
from gossamer.core import seeds as seeded
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
from gossamer.datasets import as_dataset as as_dataset
from gossamer.pack import Archive as Archive
from gossamer.pack import unpack as unpack
from gossamer.prune.dynamic import DynamicSparse as DynamicSparse
from gossamer.prune.supermask import Supermask as Supermask
from gossamer.quantize import SharedWeights as SharedWeights
from gossamer.quantize import share as share
from gossamer.quantize import share_model as share_model
from gossamer.quantize.activations import QuantizedReLU as QuantizedReLU
from gossamer.quantize.activations import quantize_activations_ as quantize_activations_
from gossamer.quantize.calibration import Precision as Precision
from gossamer.quantize.calibration import calibrate as calibrate
from gossamer.quantize.integer import IntegerNetwork as IntegerNetwork
from gossamer.quantize.loss_aware import LossAware as LossAware
from gossamer.quantize.lsq import LSQ as LSQ
from gossamer.quantize.projected import Projected as Projected
from gossamer.quantize.ttq import TTQ as TTQ
from gossamer.runtime.export import Export as Export
from gossamer.runtime.export import export as export
from gossamer.runtime.plan.plan import Plan as Plan
from gossamer.structure import Shrunk as Shrunk
from gossamer.structure import fold_batchnorm as fold_batchnorm
from gossamer.structure import shrink as shrink
from gossamer.training import Fidelity as Fidelity
from gossamer.training import Metric as Metric
from gossamer.training import Task as Task
from gossamer.training import TrainConfig as TrainConfig
from gossamer.training import curvature as curvature
from gossamer.training import distill as distill
from gossamer.training import evaluate as evaluate
from gossamer.training import soft_targets as soft_targets
from gossamer.training import task as task
from gossamer.training import train as train

__version__: str
