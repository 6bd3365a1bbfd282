"""A page to look at samples on: pictures of an image side by side, and one HTML file that holds the pictures of many.

Example:
    >>> viewer = Viewer(model, n=6, temperature=0.8, temperatures=[0, 0.4, 0.8])
    >>> views = (viewer.view(file.name, read_image(file)) for file in files)
    >>> write_page("page.html", views, title="Samples of my model", settings=viewer.settings())
"""

from ncsr_fast.gallery.page import write_page
from ncsr_fast.gallery.views import Deviation, Picture, View, Viewer

__all__ = ["Deviation", "Picture", "View", "Viewer", "write_page"]
