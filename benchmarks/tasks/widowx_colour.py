"""A reward program for the real WidowX: is the vegetable on the plate? Colours, by OpenCV (pip install opencv-python).

    make_env("widowx-real", ..., reward="benchmarks.tasks.widowx_colour:vegetable_on_plate")

As in the paper (section 5.2), it looks at where the objects are seen and at whether the gripper has let go. Copy it and
set the colours to those of your toys: `python -m benchmarks.tasks.widowx_colour PHOTO` prints what it finds in a photo.
The ones here are the simulation's, a purple eggplant and a pink plate, so that it can be tried there.
"""

import sys

import numpy as np

# Hue (0 to 179), saturation and value (0 to 255): the least and the most.
VEGETABLE = ((125, 100, 25), (145, 255, 180))
PLATE = ((160, 60, 150), (179, 255, 255))
LEAST_AREA = 0.0004  # of the image: a smaller spot is noise


def spot(image: np.ndarray, colour):
    """The largest spot of a colour in `image` (H, W, 3) uint8 RGB: its convex hull (N, 1, 2) in pixels, or None."""
    import cv2

    mask = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), *(np.array(bound, np.uint8) for bound in colour))
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hulls = [cv2.convexHull(contour) for contour in contours]
    largest = max(hulls, key=cv2.contourArea, default=None)
    if largest is None or cv2.contourArea(largest) < LEAST_AREA * mask.size:
        return None
    return largest


def vegetable_on_plate(image: np.ndarray, state: np.ndarray) -> bool:
    """Whether the vegetable's middle is seen inside the plate's outline, and the gripper is open.

    image: (H, W, 3) uint8 RGB. state: (7,), whose last number is the opening. An object that is hidden is not on it.
    """
    import cv2

    vegetable, plate = spot(image, VEGETABLE), spot(image, PLATE)
    if vegetable is None or plate is None or state[6] < 0.7:
        return False
    x, y = vegetable[:, 0].mean(axis=0)
    return cv2.pointPolygonTest(plate, (float(x), float(y)), False) >= 0


if __name__ == "__main__":
    from PIL import Image

    photo = np.asarray(Image.open(sys.argv[1]).convert("RGB"))
    for name, colour in (("vegetable", VEGETABLE), ("plate", PLATE)):
        found = spot(photo, colour)
        print(name, "not found" if found is None else f"around x, y = {found[:, 0].mean(axis=0).round()}")
    print("on the plate, were the gripper open:", vegetable_on_plate(photo, np.ones(7)))
