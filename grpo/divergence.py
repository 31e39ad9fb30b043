"""How far a student is from its teacher at one place of a text. No model, no mesh here.

Each is a function `(student_V, teacher_V, sampled) -> nats` of log-probabilities over the whole
vocabulary, the last axis, at a place that the student itself has reached; any leading axes. The
student's carry the gradient. `sampled` is the token that the student drew there, which only the
estimate looks at.

One is chosen by naming it in the experiment (`distil.divergence`); a keyword-only number has the
name of a field of `config.distil`, which fills it in.
"""

import jax
import jax.numpy as jnp


def reverse_kl(student_V: jax.Array, teacher_V: jax.Array, sampled: jax.Array) -> jax.Array:
    """KL(student || teacher) = sum over v of student * log(student / teacher).

    Seeks a mode: the student is paid for writing nothing that the teacher would not.

    Source: MiniLLM, arXiv:2306.08543, eq. 1.
    """
    return _kl(student_V, teacher_V)


def forward_kl(student_V: jax.Array, teacher_V: jax.Array, sampled: jax.Array) -> jax.Array:
    """KL(teacher || student): covers everything that the teacher might write.

    Source: Hinton et al., arXiv:1503.02531; on the student's own texts GKD, arXiv:2306.13649.
    """
    return _kl(teacher_V, student_V)


def jsd(
    student_V: jax.Array, teacher_V: jax.Array, sampled: jax.Array, *, beta: float
) -> jax.Array:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    Bounded, by log 2 at a beta of one half. For small beta it is beta times the forward KL, for
    beta near 1 it is 1 - beta times the reverse one: the learning rate wants to be larger there.

    Args:
      student_V: see above.
      teacher_V: likewise.
      sampled: not looked at.
      beta: strictly between 0 and 1.

    Source: GKD, arXiv:2306.13649, eq. 1.
    """
    mixed_V = jnp.logaddexp(jnp.log(beta) + teacher_V, jnp.log1p(-beta) + student_V)
    teacher = jnp.sum(jnp.exp(teacher_V) * (teacher_V - mixed_V), axis=-1)
    student = jnp.sum(jnp.exp(student_V) * (student_V - mixed_V), axis=-1)
    return beta * teacher + (1 - beta) * student


def sampled_reverse_kl(student_V: jax.Array, teacher_V: jax.Array, sampled: jax.Array) -> jax.Array:
    """log(student / teacher) of the sampled token: an estimate of `reverse_kl` from one token.

    Its gradient is the policy gradient with the advantage log(teacher / student), which over what
    the student samples is that of `reverse_kl`. It says less a token, and needs no more of the
    teacher than a log-probability.

    Source: Thinking Machines, "On-Policy Distillation" (2025).
    """
    student, teacher = _of_token(student_V, sampled), _of_token(teacher_V, sampled)
    fixed = jax.lax.stop_gradient(student)
    return (fixed - teacher) * jnp.exp(student - fixed)  # the factor is 1, its gradient the score


def _kl(p_V: jax.Array, q_V: jax.Array) -> jax.Array:
    """KL(p || q) as sum of p log(p / q) - p + q, of which no term is negative.

    Both add up to 1, so it is the same number; but where p = q its gradient is exactly 0, and not
    what is left of adding up thousands of rounded numbers.
    """
    p, q = jnp.exp(p_V), jnp.exp(q_V)
    return jnp.sum(p * (p_V - q_V) - p + q, axis=-1)


def _of_token(logprobs_V: jax.Array, token: jax.Array) -> jax.Array:
    """Of each place's own token: a masked sum, so that the vocabulary may be sharded."""
    ids_V = jax.lax.broadcasted_iota(jnp.int32, logprobs_V.shape, logprobs_V.ndim - 1)
    return jnp.sum(logprobs_V, axis=-1, where=ids_V == token[..., None])
