// An orbit camera. Angles in degrees: azimuth 0 shows the front, 90 the subject's left; elevation from above.
import { PerspectiveCamera, Vector3 } from "three";

export const FOV_DEG = 32;

export interface Pose {
  azimuth: number;
  elevation: number;
  /** Distance to the target in radii of the object, so that a stored pose fits another mesh too. */
  distance: number;
  /** Offset of the target from the object's centre, in radii. */
  target: [number, number, number];
}

const clamp = (value: number, low: number, high: number): number => Math.min(high, Math.max(low, value));
const radians = (degrees: number): number => (degrees * Math.PI) / 180;

/** The distance (in radii) at which a sphere fits a window of this shape, whose lower part is covered by controls. */
export function fitDistance(aspect: number, covered = 0): number {
  const half = Math.atan(Math.tan(radians(FOV_DEG) / 2) * Math.min(1 - covered, aspect));
  return 1.02 / Math.sin(half);
}

export class Orbit {
  readonly camera = new PerspectiveCamera(FOV_DEG);
  pose: Pose = { azimuth: 30, elevation: 14, distance: fitDistance(1), target: [0, 0, 0] };

  turn(azimuth: number, elevation: number): void {
    this.pose.azimuth = ((((this.pose.azimuth - azimuth) % 360) + 540) % 360) - 180;
    this.pose.elevation = clamp(this.pose.elevation + elevation, -89, 89);
  }

  zoom(factor: number): void {
    this.pose.distance = clamp(this.pose.distance * factor, 0.05, 40);
  }

  /** dx, dy in fractions of the window's height. */
  pan(dx: number, dy: number): void {
    const scale = 2 * this.pose.distance * Math.tan(radians(FOV_DEG) / 2);
    const { right, up } = this.axes();
    const moved = new Vector3().fromArray(this.pose.target).addScaledVector(right, -dx * scale).addScaledVector(up, dy * scale);
    this.pose.target = moved.toArray();
  }

  axes(): { right: Vector3; up: Vector3; back: Vector3 } {
    const [a, e] = [radians(this.pose.azimuth), radians(this.pose.elevation)];
    const [sa, ca, se, ce] = [Math.sin(a), Math.cos(a), Math.sin(e), Math.cos(e)];
    return { right: new Vector3(ca, 0, -sa), up: new Vector3(-sa * se, ce, -ca * se), back: new Vector3(sa * ce, se, ca * ce) };
  }

  /** The camera for an object of this centre and radius, centred in the part of the window that is not covered. */
  place(centre: Vector3, radius: number, aspect: number, covered: number): PerspectiveCamera {
    const { camera, pose } = this;
    const target = new Vector3().fromArray(pose.target).multiplyScalar(radius).add(centre);
    const { up, back } = this.axes();
    camera.position.copy(target).addScaledVector(back, pose.distance * radius);
    camera.up.copy(up);
    camera.lookAt(target);
    camera.aspect = aspect;
    camera.near = radius * Math.max(0.004, pose.distance - 8);
    camera.far = radius * (pose.distance + 16);
    camera.updateProjectionMatrix();
    camera.projectionMatrix.elements[9] = (camera.projectionMatrix.elements[9] ?? 0) - covered;
    camera.projectionMatrixInverse.copy(camera.projectionMatrix).invert();
    camera.updateMatrixWorld(true);
    return camera;
  }
}
