"""Networks as plans: captured, lowered to fused operators, each with the kernel fastest here."""
