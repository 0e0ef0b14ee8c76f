"""How fast a bundle is on a device, and whether that changed: `crayon profile`.

made = profile("bundle", "profile")
for difference in compare(Profile.read("before"), made).differences: ...
"""

from crayon_runtime.profile.compare import Compared, Difference, compare
from crayon_runtime.profile.document import Profile
from crayon_runtime.profile.run import profile

__all__ = ["Compared", "Difference", "Profile", "compare", "profile"]
