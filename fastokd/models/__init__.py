"""The networks, one file per family, which is imported when one of them is requested."""

from fastokd.models.assembly import assemble, check_layout, companion_builder
from fastokd.models.branch_out import branch_out
from fastokd.models.branched import (
    Backbone,
    Branch,
    BranchedModel,
    BranchOutput,
    Peer,
    PlainNetwork,
)
from fastokd.models.factory import (
    allowed_methods,
    create_model,
    create_student,
    find_backbone,
    get_backbone,
    list_models,
    model_name,
    register_model,
    split_point,
)
from fastokd.models.libraries import is_library_name
from fastokd.models.tracing import list_split_points

__all__ = [
    "Backbone",
    "Branch",
    "BranchOutput",
    "BranchedModel",
    "Peer",
    "PlainNetwork",
    "allowed_methods",
    "assemble",
    "branch_out",
    "check_layout",
    "companion_builder",
    "create_model",
    "create_student",
    "find_backbone",
    "get_backbone",
    "is_library_name",
    "list_models",
    "list_split_points",
    "model_name",
    "register_model",
    "split_point",
]
