"""A simulated WidowX 250s that answers the calls of the robot's public client; see widowx.py for the environment.

The arm's lengths, limits and meshes are Interbotix's, as PyPI's `rtb-data` ships them (`wx250s.urdf.xacro`). The calls,
codes, limits and the arithmetic of a step are those of `widowx_envs` (rail-berkeley/bridge_data_robot). Around it
stands a toy kitchen: a counter, a sink let into it, a drying rack, and the paper's three tasks (section 5.2).
"""

import importlib.util
import pathlib
from dataclasses import dataclass

import mujoco
import numpy as np

from benchmarks.tasks.dataset import TaskError
from benchmarks.tasks.ogbench_singletask import complain_about_renderer, use_headless_renderer

NO_CONNECTION, SUCCESS, EXECUTION_FAILURE, NOT_INITIALIZED = range(4)  # what the client's calls return
# Of one action: metres, radians, gripper (0 closed, 1 open). The robot clips to these.
LOW, HIGH = np.array([-0.05] * 3 + [-0.25] * 3 + [0.0]), np.array([0.05] * 3 + [0.25] * 3 + [1.0])
DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])  # gripper straight down: euler angles are zero
STEP_SECONDS, TIMESTEP = 0.2, 0.004  # of one action; of the physics

# joint, axis, origin in the parent (m), its roll and the limits (degrees), mesh, the mesh's origin and rpy (degrees),
# mass (kg). Inertias are rounded: the joints are position-controlled and weightless.
ARM = (
    ("waist", "0 0 1", "0 0 .0716", 0, (-180, 180), "2-Shoulder", "0 0 -.003", "0 0 90", 0.481),
    ("shoulder", "0 1 0", "0 0 .03865", 0, (-108, 114), "3-UA", "0 0 0", "0 0 90", 0.431),
    ("elbow", "0 1 0", ".04975 0 .25", 180, (-92, 123), "4-UF", "0 0 0", "0 0 0", 0.235),
    ("forearm_roll", "1 0 0", ".175 0 0", 0, (-180, 180), "5-LF", "0 0 0", "0 0 0", 0.221),
    ("wrist_angle", "0 1 0", ".075 0 0", 0, (-123, 100), "6-Wrist", "0 0 0", "0 180 90", 0.085),
    ("wrist_rotate", "1 0 0", ".065 0 0", -180, (-180, 180), "7-Gripper", "-.02 0 0", "0 0 90", 0.073),
)
FINGERS, END_EFFECTOR = 0.066, 0.093575  # m along the gripper: where the fingers' joints are; the point that is steered
FINGER_RANGE = (0.015, 0.037)  # m from the middle, closed and open: 8 mm and 52 mm between the fingers
NEUTRAL = np.array([0.0, -0.76, -0.44, 0.0, -1.76, 0.0])  # rad; from here the first inverse kinematics starts


@dataclass(frozen=True)
class Task:
    """One of the paper's tasks. Zones are (x, y, half length in x, half length in y), in metres."""

    instruction: str
    target: str  # what is to be moved; a key of OBJECTS
    start: tuple[float, float, float, float]  # where it lies at first
    start_height: float  # of the surface there
    goal: tuple[float, float, float, float]
    goal_height: float
    distractor: str
    distractor_zone: tuple[float, float, float, float]
    distractors: bool  # whether the distractor is there if nobody says otherwise


COUNTER, SINK, RACK = (0.29, 0.14, 0.05, 0.045), (0.29, -0.01, 0.09, 0.07), (0.29, -0.165, 0.08, 0.055)
PLATE = (0.29, -0.01, 0.04, 0.04)
SINK_DEPTH, RACK_HEIGHT = 0.03, 0.03
TASKS = {
    "vegetable": Task(
        "put the vegetable on the plate", "eggplant", COUNTER, 0.0, PLATE, -SINK_DEPTH, "wing", COUNTER, True
    ),
    "cup": Task(
        "put the cup on the drying rack", "cup", COUNTER, 0.0, RACK, RACK_HEIGHT, "wing", (0.29, -0.01, 0.05, 0.03),
        True,
    ),
    "pot": Task(
        "put the pot in the sink", "pot", (0.29, -0.165, 0.04, 0.015), RACK_HEIGHT, SINK, -SINK_DEPTH, "wing", COUNTER,
        False,
    ),
}  # fmt: skip

# What can lie about: its height above the surface when it rests, how far below its middle the fingers' point goes to
# grasp it (negative: above), and its shapes. All of it fits between the fingers somewhere.
OBJECTS = {
    "eggplant": (
        0.015, 0.0,
        '<geom class="thing" type="capsule" size=".015 .02" euler="0 90 0" rgba=".35 .1 .5 1" mass=".03"/>'
        '<geom class="look" type="cylinder" size=".007 .006" pos=".037 0 0" euler="0 90 0" rgba=".2 .6 .2 1"/>',
    ),
    "wing": (
        0.013, 0.0,
        '<geom class="thing" type="capsule" size=".013 .014" euler="0 90 0" rgba=".75 .4 .1 1" mass=".03"/>'
        '<geom class="thing" type="sphere" size=".009" pos=".034 0 -.003" rgba=".95 .85 .65 1" mass=".003"/>',
    ),
    "cup": (
        0.025, -0.008,
        '<geom class="thing" type="cylinder" size=".018 .025" rgba=".9 .85 .1 1" mass=".03"/>'
        '<geom class="look" type="cylinder" size=".015 .0005" pos="0 0 .0252" rgba=".35 .3 .05 1"/>',
    ),
    "pot": (
        0.015, -0.032,
        '<geom class="thing" type="cylinder" size=".028 .015" rgba=".2 .45 .75 1" mass=".04"/>'
        '<geom class="thing" type="box" size=".026 .007 .009" pos="0 0 .031" rgba=".12 .12 .14 1" mass=".006"/>'
        '<geom class="thing" type="box" size=".004 .007 .008" pos="0 0 .0155" rgba=".12 .12 .14 1" mass=".002"/>',
    ),
}  # fmt: skip


def rotation(euler) -> np.ndarray:
    """Roll, pitch, yaw about the fixed axes, in that order (rad) -> (3, 3)."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(euler), np.sin(euler)
    roll = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    pitch = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    yaw = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return yaw @ pitch @ roll


def euler_angles(matrix) -> np.ndarray:
    """The inverse of `rotation`, pitch in [-pi/2, pi/2]."""
    pitch = np.arctan2(-matrix[2, 0], np.hypot(matrix[0, 0], matrix[1, 0]))
    return np.array([np.arctan2(matrix[2, 1], matrix[2, 2]), pitch, np.arctan2(matrix[1, 0], matrix[0, 0])])


# --- THE MODEL ---


def mesh_folder() -> pathlib.Path:
    """Where `rtb-data` keeps the arm's meshes.

    Raises:
        TaskError: the package is not installed.
    """
    spec = importlib.util.find_spec("rtbdata")
    if spec is None:
        raise TaskError("the simulated WidowX needs the meshes in rtb-data: pip install rtb-data")
    return pathlib.Path(spec.origin).parent / "xacro" / "trossen_descriptions" / "meshes" / "meshes_wx250s"


def arm_xml() -> str:
    """The arm's bodies, one in the other: what is seen are the meshes, what touches are two pads and the gripper."""
    look = '<geom class="look" type="mesh" mesh="{}" pos="{}" euler="{}" rgba="{}"/>'
    black, grey = ".13 .13 .15 1", ".25 .25 .27 1"
    opened = look.format("1-Base", "0 0 0", "0 0 90", black)
    for joint, axis, origin, roll, limits, mesh, mesh_origin, mesh_rpy, mass in ARM:
        opened += f"""
        <body name="{joint}" pos="{origin}" euler="{roll} 0 0" gravcomp="1">
        <inertial pos="0 0 0" mass="{mass}" diaginertia=".0005 .0005 .0005"/>
        <joint class="arm" name="{joint}" axis="{axis}" range="{limits[0]} {limits[1]}"/>
        {look.format(mesh, mesh_origin, mesh_rpy, black)}"""
    opened += look.format("9-Gripper-Bar", "-.02 0 0", "0 0 90", black)
    opened += f"""
        <geom class="touch" type="box" size=".012 .05 .015" pos=".045 0 0"/>
        <site name="end_effector" pos="{END_EFFECTOR} 0 0"/>"""
    for side, sign, rpy in (("left", 1, "180 180 0"), ("right", -1, "0 180 0")):
        low, high = sorted(sign * limit for limit in FINGER_RANGE)
        opened += f"""
        <body name="{side}_finger" pos="{FINGERS} 0 0" gravcomp="1">
        <inertial pos="0 0 0" mass=".016" diaginertia="5e-6 5e-6 5e-6"/>
        <joint class="finger" name="{side}_finger" axis="0 1 0" range="{low} {high}"/>
        {look.format("10-Finger", f"0 {sign * 0.005} 0", rpy, grey)}
        <geom class="pad" type="box" size=".0155 .004 .0135" pos=".0275 {-sign * 0.007} 0"/>
        </body>"""
    return opened + "</body>" * len(ARM)


def kitchen_xml() -> str:
    """Counter, sink and rack, as boxes: the counter's top is at height 0, around the sink's opening."""
    (x, y, a, b), thick = SINK, 0.03
    left, right, near, far = 0.35, -0.35, -0.15, 0.55  # the counter's edges
    tops = (
        (near, x - a, right, left),
        (x + a, far, right, left),
        (x - a, x + a, right, y - b),
        (x - a, x + a, y + b, left),
    )
    boxes = "".join(
        f'<geom class="still" type="box" pos="{(x0 + x1) / 2} {(y0 + y1) / 2} {-thick}" '
        f'size="{(x1 - x0) / 2} {(y1 - y0) / 2} {thick}" rgba=".82 .74 .6 1"/>'
        for x0, x1, y0, y1 in tops
    )
    boxes += f"""
    <geom class="still" type="box" pos="{x} {y} {-SINK_DEPTH - 0.02}" size="{a} {b} .02" rgba=".6 .66 .7 1"/>
    <geom class="still" type="box" pos="{RACK[0]} {RACK[1]} {RACK_HEIGHT / 2}"
     size="{RACK[2]} {RACK[3]} {RACK_HEIGHT / 2}" rgba=".93 .93 .95 1"/>"""
    for bar in np.linspace(-0.9, 0.9, 7):
        boxes += (
            f'<geom class="look" type="box" pos="{RACK[0] + bar * RACK[2]} {RACK[1]} {RACK_HEIGHT}" '
            f'size=".003 {RACK[3]} .0005" rgba=".55 .58 .62 1"/>'
        )
    return boxes


def build_model(task: Task, distractors: bool) -> mujoco.MjModel:
    """Arm, kitchen, plate and objects as one MuJoCo model, seen from over the robot's left shoulder."""
    folder = mesh_folder()
    names = ["1-Base", *(part[5] for part in ARM), "9-Gripper-Bar", "10-Finger"]
    meshes = "".join(f'<mesh name="{name}" file="WXSA-250-M-{name}.stl" scale=".001 .001 .001"/>' for name in names)
    things = {"target": task.target} | ({"distractor": task.distractor} if distractors else {})
    bodies = "".join(
        f'<body name="{name}"><freejoint name="{name}"/>{OBJECTS[kind][2]}</body>' for name, kind in things.items()
    )
    plate = ""
    if task.goal is PLATE:
        plate = (
            f'<geom class="look" type="cylinder" pos="{PLATE[0]} {PLATE[1]} {-SINK_DEPTH}" size=".055 .002" '
            'rgba=".95 .5 .65 1"/>'
        )
    servos = "".join(f'<position joint="{part[0]}" kp="300" kv="12"/>' for part in ARM)
    servos += "".join(
        f'<position joint="{side}_finger" kp="400" kv="10" forcerange="-6 6"/>' for side in ("left", "right")
    )
    # The flags let a round bottom stand on a flat one at several points; MuJoCo before 3.3 left them off.
    return mujoco.MjModel.from_xml_string(f"""
    <mujoco>
    <compiler meshdir="{folder}" eulerseq="XYZ" angle="degree"/>
    <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="5">
      <flag multiccd="enable" nativeccd="enable"/>
    </option>
    <visual>
      <global offwidth="1024" offheight="1024"/><quality offsamples="0" shadowsize="0"/>
      <headlight ambient=".45 .45 .45" diffuse=".45 .45 .45" specular="0 0 0"/><map znear=".05"/>
    </visual>
    <default>
      <default class="arm"><joint damping="1" armature=".1"/></default>
      <default class="finger"><joint type="slide" damping="2" armature=".05"/></default>
      <default class="look"><geom contype="0" conaffinity="0" mass="0" group="1"/></default>
      <default class="still"><geom contype="1" conaffinity="2" friction=".8 .01 .001"/></default>
      <default class="thing"><geom contype="2" conaffinity="3" condim="6" friction="1 .01 .003"/></default>
      <default class="touch"><geom contype="2" conaffinity="2" mass="0" group="3"/></default>
      <default class="pad">
        <geom contype="2" conaffinity="3" condim="4" friction="1.5 .02 .001" mass="0" group="3"/>
      </default>
    </default>
    <asset>{meshes}<texture type="skybox" builtin="flat" rgb1=".7 .74 .76" width="8" height="8"/></asset>
    <worldbody>
      <light pos="0 .5 1" dir=".2 -.4 -1" diffuse=".35 .35 .35" specular="0 0 0" castshadow="false"/>
      <camera name="shoulder" mode="targetbody" target="view" pos="-.02 .34 .5" fovy="48"/>
      <body name="view" pos=".28 -.03 .05"/>
      {kitchen_xml()}{plate}{arm_xml()}{bodies}
    </worldbody>
    <equality><joint joint1="left_finger" joint2="right_finger" polycoef="0 -1 0 0 0"/></equality>
    <contact><exclude body1="left_finger" body2="right_finger"/></contact>
    <actuator>{servos}</actuator>
    </mujoco>""")


# --- THE CLIENT ---


class SimClient:
    """The simulated robot behind the calls of `widowx_envs`' WidowXClient; no call takes wall-clock time of its own.

    `reset` also stands in for the person who puts the objects back: they are drawn anew. For tests it can lose frames
    (`drop_rate`) and its connection (`disconnect`).

    Args:
        task: a key of TASKS.
        image_size: H = W of the images.
        distractors: whether the distractor is there; None: as in the paper (pot: not).
        drop_rate: share of observations that are None.
        seed: of the objects' poses, and of which frames are lost.
    Raises:
        TaskError: rtb-data is missing.
    """

    def __init__(self, task="vegetable", image_size=256, distractors: bool | None = None, drop_rate=0.0, seed: int = 0):
        self.task, self.image_size, self.drop_rate = TASKS[task], image_size, drop_rate
        self.distractors = self.task.distractors if distractors is None else distractors
        self.model = build_model(self.task, self.distractors)
        self.data, self.scratch = mujoco.MjData(self.model), mujoco.MjData(self.model)
        self.site = self.model.site("end_effector").id
        self.pads = [int(self.model.body(f"{side}_finger").id) for side in ("left", "right")]
        self.limits = np.deg2rad([part[4] for part in ARM])
        self.renderer, self.initialized, self.calls_to_lose, self.hidden = None, False, 0, False
        self.seed(seed)

    def seed(self, seed) -> None:
        """From now on the objects' poses are those of this seed."""
        self.random, self.frame_random = np.random.default_rng(seed), np.random.default_rng([seed, 1])

    def place(self, seed) -> None:
        """Begin anew, with the objects where this seed puts them; a `hidden` distractor out of sight."""
        self.seed(seed)
        self._reset()

    def disconnect(self, calls: int) -> None:
        """The next `calls` calls are not answered: NO_CONNECTION, or None instead of an observation."""
        self.calls_to_lose = calls

    def success(self) -> bool:
        """The target lies in its goal, and neither finger touches it."""
        x, y, a, b = self.task.goal
        position = self.position("target")
        height = position[2] - self.task.goal_height - OBJECTS[self.task.target][0]
        inside = abs(position[0] - x) <= a and abs(position[1] - y) <= b and abs(height) < 0.012
        return bool(inside and not self.touched_by())

    def position(self, name: str) -> np.ndarray:
        """(3,) of the `target` or the `distractor`, in metres."""
        return self.data.body(name).xpos.copy()

    def touched_by(self, name: str = "target") -> set[int]:
        """Which fingers (their bodies) touch an object."""
        body = self.model.body(name).id
        pairs = [{int(b) for b in self.model.geom_bodyid[contact.geom]} for contact in self.data.contact]
        return {finger for finger in self.pads for pair in pairs if pair == {finger, body}}

    # The public client's calls

    def init(self, env_params: dict, image_size: int | None = None) -> int:
        """`start_state` (7,) and `override_workspace_boundaries` (low, high) are what counts of `env_params`."""
        if self._lost():
            return NO_CONNECTION
        self.start = np.array(env_params["start_state"], float)
        self.low, self.high = (np.array(bound[:3], float) for bound in env_params["override_workspace_boundaries"])
        if image_size is not None and image_size != self.image_size:
            self._close_renderer()
            self.image_size = image_size
        self.initialized = True
        self._reset()
        return SUCCESS

    def reset(self) -> int:
        if (refusal := self._refusal()) is not None:
            return refusal
        self._reset()
        return SUCCESS

    def stop(self) -> None:
        self._close_renderer()

    def move(self, pose, duration: float = 1.0, blocking: bool = False) -> int:
        """To `pose`: (4, 4), or (6,) of xyz and euler angles against the world (straight down is pitch pi/2)."""
        if (refusal := self._refusal()) is not None:
            return refusal
        pose = np.asarray(pose, float)
        if pose.shape != (4, 4):
            position, matrix = pose[:3], rotation(pose[3:])
        else:
            position, matrix = pose[:3, 3], pose[:3, :3]
        self.target = position.copy(), matrix.copy()
        self._drive(duration)
        self.target = self._pose()  # as the robot does: the next step counts from where it came to stand
        return SUCCESS

    def move_gripper(self, state: float) -> int:
        if (refusal := self._refusal()) is not None:
            return refusal
        self.gripper = float(state > 0.5)
        self._drive(STEP_SECONDS)
        return SUCCESS

    def step_action(self, action, blocking: bool = False) -> int:
        """One action of 7 numbers, or of 5 (without roll and pitch), clipped to LOW and HIGH; see widowx.py."""
        if (refusal := self._refusal()) is not None:
            return refusal
        action = np.asarray(action, float)
        if len(action) == 5:
            action = np.concatenate([action[:3], [0.0, 0.0], action[3:]])
        action = np.clip(action, LOW, HIGH)
        self.target = next_target(*self.target, action, self._pose()[0], self.low, self.high)
        self.gripper = action[6]
        self._drive(STEP_SECONDS)
        return SUCCESS

    def get_observation(self) -> dict | None:
        """`full_image` (H, W, 3) uint8, `image` (1, 3 H W) float32, `state` (7,): xyz, euler angles, gripper."""
        if self._refusal() is not None or self.frame_random.random() < self.drop_rate:
            return None
        image = self.render()
        flat = (image.transpose(2, 0, 1).reshape(1, -1) / 255).astype(np.float32)
        return {"image": flat, "state": self.state(), "full_image": image}

    # Behind them

    def state(self) -> np.ndarray:
        position, matrix = self._pose()
        closed, opened = FINGER_RANGE
        gripper = np.clip((self.data.joint("left_finger").qpos[0] - closed) / (opened - closed), 0.0, 1.0)
        return np.concatenate([position, euler_angles(matrix @ DOWN.T), [gripper]])

    def render(self) -> np.ndarray:
        """(H, W, 3) uint8 from over the shoulder.

        Raises:
            TaskError: nothing can be rendered on this machine; it says what to install.
        """
        if self.renderer is None:
            use_headless_renderer()
            with complain_about_renderer():
                self.renderer = mujoco.Renderer(self.model, self.image_size, self.image_size)
            self.options = mujoco.MjvOption()
            self.options.geomgroup[3] = 0
            self.options.sitegroup[:] = 0
        self.renderer.update_scene(self.data, "shoulder", self.options)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[flag] = 0
        return self.renderer.render().copy()

    def _close_renderer(self):
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None

    def _lost(self) -> bool:
        lost, self.calls_to_lose = self.calls_to_lose > 0, max(0, self.calls_to_lose - 1)
        return lost

    def _refusal(self) -> int | None:
        """The code of a call that cannot be answered, else None."""
        return NO_CONNECTION if self._lost() else None if self.initialized else NOT_INITIALIZED

    def _pose(self) -> tuple[np.ndarray, np.ndarray]:
        return self.data.site_xpos[self.site].copy(), self.data.site_xmat[self.site].reshape(3, 3).copy()

    def _reset(self):
        """Arm to the start, gripper open, objects drawn anew; then 0.2 s for them to come to rest."""
        mujoco.mj_resetData(self.model, self.data)
        self.target, self.gripper = (self.start[:3].copy(), rotation(self.start[3:6]) @ DOWN), self.start[6]
        joints = self.inverse_kinematics(NEUTRAL, *self.target)
        finger = self._finger()
        self.data.qpos[:8] = self.data.ctrl[:8] = [*joints, finger, -finger]
        places = [("target", self.task.target, self.task.start, self.task.start_height)]
        if self.distractors:
            height = 0.0 if self.task.distractor_zone is COUNTER else -SINK_DEPTH
            places.append(("distractor", self.task.distractor, self.task.distractor_zone, height))
        taken = []
        for name, kind, (x, y, a, b), height in places:
            place = None
            while place is None or any(np.linalg.norm(place - other) < 0.06 for other in taken):
                place = np.array([x, y]) + self.random.uniform(-1, 1, 2) * (a, b)
            taken.append(place)
            yaw = self.random.uniform(-0.5, 0.5)
            if name == "distractor" and self.hidden:
                place = np.array([-5.0, 0.0])  # behind the robot, where the camera does not look
            self.data.joint(name).qpos[:] = [
                *place,
                height + OBJECTS[kind][0] + 0.001,
                np.cos(yaw / 2),
                0,
                0,
                np.sin(yaw / 2),
            ]
        mujoco.mj_step(self.model, self.data, round(0.2 / TIMESTEP))
        self.target = self._pose()

    def _finger(self) -> float:
        return FINGER_RANGE[0] + self.gripper * (FINGER_RANGE[1] - FINGER_RANGE[0])

    def _drive(self, seconds: float):
        """The servos' set points go to the target in a straight line, over the first four fifths of the time."""
        start = self.data.ctrl.copy()
        finger = self._finger()
        goal = np.array([*self.inverse_kinematics(start[:6], *self.target), finger, -finger])
        pieces = 10
        for piece in range(pieces):
            self.data.ctrl[:6] = (start + min(1.0, (piece + 1) / (0.8 * pieces)) * (goal - start))[:6]
            self.data.ctrl[6:] = goal[6:]
            mujoco.mj_step(self.model, self.data, max(1, round(seconds / TIMESTEP / pieces)))

    def inverse_kinematics(self, joints, position, matrix, steps: int = 30) -> np.ndarray:
        """Joint angles (6,) near `joints` that bring the end effector to a pose, or as near to it as it comes.

        Damped least squares on position and rotation vector. The robot itself stays where it is if there is none.
        """
        joints, jacobian = np.array(joints), np.zeros((6, self.model.nv))
        for _ in range(steps):
            self.scratch.qpos[:6] = joints
            mujoco.mj_kinematics(self.model, self.scratch)
            mujoco.mj_comPos(self.model, self.scratch)
            here = self.scratch.site_xmat[self.site].reshape(3, 3)
            turn = np.zeros(4)
            mujoco.mju_mat2Quat(turn, (matrix @ here.T).ravel())
            error = np.zeros(6)
            error[:3] = position - self.scratch.site_xpos[self.site]
            mujoco.mju_quat2Vel(error[3:], turn, 1.0)
            if np.abs(error).max() < 1e-4:
                break
            mujoco.mj_jacSite(self.model, self.scratch, jacobian[:3], jacobian[3:], self.site)
            arm = jacobian[:, :6]
            step = arm.T @ np.linalg.solve(arm @ arm.T + 1e-4 * np.eye(6), error)
            joints = np.clip(joints + np.clip(step, -0.3, 0.3), *self.limits.T)
        return joints


def next_target(position, matrix, action, here, low, high) -> tuple[np.ndarray, np.ndarray]:
    """The pose that the robot steers to after one (clipped) action.

    The turn is about where the end effector is (`here`), the shift is added to the last target, and the box cuts the
    position only: `RobotBaseEnv._next_qpos` of bridge_data_robot.
    """
    turn = rotation(action[3:6])
    return np.clip(here + turn @ (position - here) + action[:3], low, high), turn @ matrix
