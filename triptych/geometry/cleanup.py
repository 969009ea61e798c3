"""Mesh repair and simplification: pure functions ``Mesh -> Mesh``.

Operations that only drop or merge faces (``weld``, ``remove_degenerate``, ``keep_components``) carry UV, colours,
normals and materials along. Those that move or create surface (``fill_holes``, ``smooth``, ``decimate``) say what they
keep: a texture drawn for one surface does not fit another, so bake it again afterwards.
"""

from __future__ import annotations

import numpy as np

from ..errors import TriptychError
from .mesh import Mesh
from .polygons import triangulate


def weld(mesh: Mesh, tolerance: float = 0.0) -> Mesh:
    """Merge vertices at one position, and drop the unused ones.

    tolerance: size of the grid, in world units, on which positions count as equal; 0 merges exactly equal ones.
    Colours and normals are averaged over what is merged; per-vertex UV become corner UV, so that seams survive. Faces
    that collapse stay (see ``remove_degenerate``). Vertices keep the order of their first appearance.
    """
    if tolerance < 0:
        raise TriptychError(f"weld tolerance must be at least 0, got {tolerance}")
    keys = mesh.vertices + np.float32(0) if tolerance == 0 else np.round(mesh.vertices.astype(np.float64) / tolerance)
    _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    group, first = rank[group.reshape(-1)], first[order]
    uv_faces = mesh.faces if mesh.uv is not None and mesh.uv_faces is None else mesh.uv_faces
    if len(first) == len(mesh.vertices):
        return compact(mesh)
    merged = mesh.replace(
        vertices=mesh.vertices[first],
        faces=group[mesh.faces],
        normals=None if mesh.normals is None else _unit(_group_mean(mesh.normals, group, len(first))),
        colors=None if mesh.colors is None else _group_mean(mesh.colors, group, len(first)).astype(np.float32),
        uv_faces=uv_faces,
    )
    return compact(merged)


def compact(mesh: Mesh) -> Mesh:
    """Without the vertices and UV coordinates that no face uses; the same mesh when there are none."""
    used = np.unique(mesh.faces)
    changes: dict[str, np.ndarray | None] = {}
    if len(used) < len(mesh.vertices):
        renumber = np.zeros(len(mesh.vertices), np.int64)
        renumber[used] = np.arange(len(used))
        changes = {"vertices": mesh.vertices[used], "faces": renumber[mesh.faces]}
        for name in ("normals", "colors") if mesh.uv_faces is not None else ("normals", "colors", "uv"):
            values = getattr(mesh, name)
            changes[name] = None if values is None else values[used]
    if mesh.uv is not None and mesh.uv_faces is not None:
        used_uv = np.unique(mesh.uv_faces)
        if len(used_uv) < len(mesh.uv):
            changes |= {"uv": mesh.uv[used_uv], "uv_faces": np.searchsorted(used_uv, mesh.uv_faces)}
    return mesh.replace(**changes) if changes else mesh


def keep_faces(mesh: Mesh, keep: np.ndarray) -> Mesh:
    """The faces where ``keep`` (F,) is true, with their attributes; unused vertices are dropped."""
    return compact(
        mesh.replace(
            faces=mesh.faces[keep],
            uv_faces=None if mesh.uv_faces is None else mesh.uv_faces[keep],
            face_materials=None if mesh.face_materials is None else mesh.face_materials[keep],
        )
    )


def remove_degenerate(mesh: Mesh, min_height: float = 0.0) -> Mesh:
    """Without faces that use a vertex twice, have no area, or repeat another face (same vertices, same winding).

    min_height: world units; a triangle whose height over its longest side is at or below it counts as having no area.
    """
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    edges = corners - np.roll(corners, 1, axis=1)
    longest = np.linalg.norm(edges, axis=2).max(axis=1)
    double_area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    faces = mesh.faces
    distinct = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    good = distinct & (double_area > min_height * longest) & (double_area > 0)
    lowest = faces.argmin(axis=1)
    turned = faces[np.arange(len(faces))[:, None], (lowest[:, None] + np.arange(3)) % 3]
    # The first of each set of equal faces, looking at good ones only.
    rows = np.flatnonzero(good)
    _, first = np.unique(turned[rows], axis=0, return_index=True)
    keep = np.zeros(len(faces), bool)
    keep[rows[first]] = True
    return keep_faces(mesh, keep)


def face_components(mesh: Mesh) -> np.ndarray:
    """(F,) int: the connected component of each face; faces are connected when they share a vertex position."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    _, welded = np.unique(mesh.vertices + np.float32(0), axis=0, return_inverse=True)
    faces = welded.reshape(-1)[mesh.faces]
    count = int(faces.max()) + 1 if len(faces) else 0
    rows, columns = faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel()
    graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    _, labels = np.unique(labels[faces[:, 0]], return_inverse=True)
    return labels.reshape(-1)


def keep_components(mesh: Mesh, min_share: float = 0.01) -> Mesh:
    """Without the connected components whose area is below ``min_share`` (0-1) of the largest component's area."""
    if not 0 <= min_share <= 1:
        raise TriptychError(f"min_share must lie in 0 to 1, got {min_share}")
    if not len(mesh.faces):
        return mesh
    labels = face_components(mesh)
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    total = np.bincount(labels, areas)
    return keep_faces(mesh, (total >= min_share * total.max())[labels])


def boundary_loops(mesh: Mesh) -> list[np.ndarray]:
    """The open borders as loops of vertex indices, each in the direction that a filling face would use.

    Where several borders meet in one vertex they are told apart arbitrarily; a border that does not close is left out.
    """
    faces, count = mesh.faces, len(mesh.vertices)
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    forward, backward = edges[:, 0] * count + edges[:, 1], edges[:, 1] * count + edges[:, 0]
    open_edges = edges[~np.isin(forward, backward)]
    following: dict[int, list[int]] = {}
    for start, end in open_edges[:, ::-1].tolist():
        following.setdefault(start, []).append(end)
    loops = []
    while following:
        start = next(iter(following))
        path: list[int] = []
        place: dict[int, int] = {}
        vertex = start
        while vertex in following:
            place[vertex] = len(path)
            path.append(vertex)
            ends = following[vertex]
            after = ends.pop()
            if not ends:
                del following[vertex]
            if after in place:  # closed: what lies before belongs to another loop through this vertex
                loop = path[place[after] :]
                loops.append(np.array(loop))
                path = path[: place[after]]
                place = {v: i for i, v in enumerate(path)}
            vertex = after
    return loops


def fill_holes(mesh: Mesh, max_edges: int = 64) -> Mesh:
    """Close open borders of at most ``max_edges`` edges by triangles between the border's own vertices.

    A hole that is flat or nearly so is cut by ear clipping, which adds no vertices; weld first, or every seam is a
    border. New faces take the material of the first face; their corner UV are those of a face at the border, so bake
    the texture again where it matters. Long borders (the bottom of a scan) stay: raise ``max_edges`` to close them.
    """
    loops = [loop for loop in boundary_loops(mesh) if 3 <= len(loop) <= max_edges]
    if not loops:
        return mesh
    patches = []
    for loop in loops:
        cut = triangulate(mesh.vertices, loop[None])[0]
        patches.append(loop[cut])
    added = np.concatenate(patches)
    changes: dict[str, np.ndarray] = {"faces": np.concatenate([mesh.faces, added])}
    if mesh.uv_faces is not None:
        uv_of_vertex = np.zeros(len(mesh.vertices), np.int64)
        uv_of_vertex[mesh.faces.ravel()] = mesh.uv_faces.ravel()
        changes["uv_faces"] = np.concatenate([mesh.uv_faces, uv_of_vertex[added]])
    if mesh.face_materials is not None:
        changes["face_materials"] = np.concatenate([mesh.face_materials, np.full(len(added), mesh.face_materials[0])])
    return mesh.replace(**changes)


def decimate(mesh: Mesh, target_faces: int) -> Mesh:
    """About ``target_faces`` faces by quadric edge collapse (Garland and Heckbert 1997, package fast_simplification).

    Keeps positions only plus vertex colours (taken from the nearest original vertex); UV, materials and normals are
    dropped. The mesh is welded first. Unchanged when it has no more faces than that. Raises TriptychError for a
    target below 4, or when nothing is left.
    """
    if target_faces < 4:
        raise TriptychError(f"target_faces must be at least 4 (a tetrahedron), got {target_faces}")
    if len(mesh.faces) <= target_faces:
        return mesh
    import fast_simplification
    from scipy.spatial import cKDTree

    welded = weld(Mesh(mesh.vertices, mesh.faces, colors=mesh.colors))
    vertices, faces = fast_simplification.simplify(
        np.ascontiguousarray(welded.vertices, np.float32),
        np.ascontiguousarray(welded.faces, np.int32),
        target_count=int(target_faces),
    )
    if not len(faces):
        raise TriptychError(
            f"nothing is left of {len(mesh.faces)} faces at target_faces={target_faces}: ask for more faces"
        )
    colors = None
    if welded.colors is not None:
        colors = welded.colors[cKDTree(welded.vertices).query(vertices)[1]]
    return compact(Mesh(np.asarray(vertices, np.float32), np.asarray(faces, np.int64), colors=colors))


def smooth(mesh: Mesh, iterations: int = 10, strength: float = 0.5, passband: float = 0.1) -> Mesh:
    """Smooth without shrinking: Taubin, "A signal processing approach to fair surface design" (1995).

    iterations: pairs of a step inwards (``strength``, 0-1) and a step outwards, whose size follows from
    ``passband`` (0-1): features below that frequency of the umbrella operator keep their size. Open borders stay where
    they are. Faces, colours, UV and materials are kept; stored normals are dropped. Weld first: a seam is a border.
    """
    if iterations < 0 or not 0 < strength <= 1 or not 0 < passband < 1:
        raise TriptychError(
            f"smooth needs iterations >= 0, strength and passband in 0 to 1, got {iterations}, {strength}, {passband}"
        )
    if iterations == 0 or not len(mesh.faces):
        return mesh
    from scipy.sparse import coo_matrix, diags

    faces, count = mesh.faces, len(mesh.vertices)
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    both = np.concatenate([edges, edges[:, ::-1]])
    adjacency = coo_matrix((np.ones(len(both)), (both[:, 0], both[:, 1])), shape=(count, count)).tocsr()
    adjacency.data[:] = 1.0
    degree = np.maximum(np.asarray(adjacency.sum(axis=1)).ravel(), 1.0)
    average = diags(1 / degree) @ adjacency
    free = np.ones((count, 1))
    key, reverse = edges[:, 0] * count + edges[:, 1], edges[:, 1] * count + edges[:, 0]
    free[edges[~np.isin(key, reverse)].ravel()] = 0.0
    free[~np.isin(np.arange(count), faces)] = 0.0
    outward = strength / (1 - passband * strength)
    positions = mesh.vertices.astype(np.float64)
    for _ in range(iterations):
        positions = positions + strength * free * (average @ positions - positions)
        positions = positions - outward * free * (average @ positions - positions)
    return mesh.replace(vertices=positions.astype(np.float32), normals=None)


def _group_mean(values: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    total = np.stack([np.bincount(group, values[:, k], count) for k in range(values.shape[1])], axis=1)
    return total / np.bincount(group, minlength=count)[:, None]


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0).astype(np.float32)
