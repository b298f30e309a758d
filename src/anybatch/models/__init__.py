"""Networks built from a scheme, one file a family."""

from anybatch.models.network import FeaturePyramid as FeaturePyramid
from anybatch.models.network import Network as Network
from anybatch.models.preprocessing import transforms as transforms
from anybatch.models.registry import create_model as create_model
from anybatch.models.registry import list_models as list_models
from anybatch.models.registry import model_entry as model_entry
from anybatch.models.registry import model_options as model_options
from anybatch.models.registry import register_model as register_model
from anybatch.models.timm_registry import register_timm as register_timm
from anybatch.models.weights import export_weights as export_weights
from anybatch.models.weights import load_weights as load_weights
