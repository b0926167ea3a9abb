"""The public names, and where each is defined. `jllama/__init__.py` reads this list, and type checkers do."""

from jllama.backends import backends as backends
from jllama.cache import KVCache as KVCache
from jllama.cache import init_cache as init_cache
from jllama.config import LlamaConfig as LlamaConfig
from jllama.config import preset as preset
from jllama.decode import DecodeState as DecodeState
from jllama.decode import Generated as Generated
from jllama.decode import decode_step as decode_step
from jllama.decode import generate as generate
from jllama.demo_model import DEMO as DEMO
from jllama.engine.engine import Engine as Engine
from jllama.engine.request import Completion as Completion
from jllama.engine.request import Request as Request
from jllama.engine.request import SamplingSettings as SamplingSettings
from jllama.engine.rollout import rollout as rollout
from jllama.errors import InputError as InputError
from jllama.formats.checkpoint import load as load
from jllama.formats.checkpoint import save as save
from jllama.formats.lora import load_lora as load_lora
from jllama.formats.lora import merge_lora as merge_lora
from jllama.kernels import Choice as Choice
from jllama.kernels import QuantizedTensor as QuantizedTensor
from jllama.kernels import Unsupported as Unsupported
from jllama.kernels import quantize as quantize
from jllama.mesh.place import shard as shard
from jllama.mesh.place import shardings as shardings
from jllama.mesh.place import unshard as unshard
from jllama.model import forward as forward
from jllama.params import Layer as Layer
from jllama.params import Params as Params
from jllama.params import init as init
from jllama.params import stack as stack
from jllama.params import unstack as unstack
from jllama.sampling import Sampling as Sampling
from jllama.sampling import make_sampling as make_sampling
from jllama.sampling import sample as sample
from jllama.stream import Session as Session
from jllama.text.complete import complete as complete
from jllama.text.lm import LM as LM
from jllama.text.tokenizer import load_tokenizer as load_tokenizer

__version__: str
