"""Operations of the decoding path: a kernel each, beside a plain-Jittor reference that reads like the equation."""
