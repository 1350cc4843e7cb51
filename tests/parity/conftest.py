"""What is compared with the references is compiled as users compile it, where other tests save themselves the time."""

import os

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "false"
