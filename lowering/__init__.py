"""What Inductor makes of our operators. Importing this package registers it; see the modules for what each does."""

from . import attention, packing

attention.register()
packing.register()
