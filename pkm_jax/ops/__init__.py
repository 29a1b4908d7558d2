"""Operations of a backbone whose derivatives or kernels are written by hand."""
