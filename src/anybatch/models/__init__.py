"""Networks built from a scheme, one file a family."""

from anybatch.models.registry import create_model as create_model
from anybatch.models.registry import list_models as list_models
from anybatch.models.registry import model_options as model_options
from anybatch.models.registry import register_model as register_model
