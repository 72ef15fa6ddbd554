"""A thin singular-value decomposition that does not fail on hard matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from makeweight.errors import out_of_memory

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


def thin_svd(matrix_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (O, R), sigma (R,) descending and V (I, R) with matrix = U diag(sigma) V^T, in the matrix's dtype.

    Works in fp32 or fp64 (low precisions are widened to fp32). Where the driver does not converge the next is
    tried: on CUDA `gesvdj`, then `gesvd`, then LAPACK on the CPU; on the CPU the same matrix in fp64.
    """
    work_OI = matrix_OI if matrix_OI.dtype == torch.float64 else matrix_OI.float()
    attempts = [(work_OI, driver) for driver in ("gesvdj", "gesvd")] if work_OI.is_cuda else []
    attempts += [(work_OI.cpu(), None), (work_OI.cpu().double(), None)]
    for candidate_OI, driver in attempts:
        try:
            u_OR, sigma_R, vt_RI = torch.linalg.svd(candidate_OI, full_matrices=False, driver=driver)
        except RuntimeError as error:
            # A driver that a build of torch lacks raises a plain one.
            if out_of_memory(error) or not (driver or isinstance(error, LinAlgError)):
                raise
            continue
        return u_OR.to(work_OI), sigma_R.to(work_OI), vt_RI.T.contiguous().to(work_OI)
    raise LinAlgError(f"no driver decomposed a {tuple(matrix_OI.shape)} matrix")
