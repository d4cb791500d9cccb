"""One adapted layer: how B @ A lies in its weight, its forward, its exact merge.

Nothing here opens or searches an injected model; some files take the list of its modules.

[Note: nouns of an adapted layer]

Every file of this folder takes these for granted:

    W           the weight as its module stores it, frozen. A matrix is (out, in); low_rank.py has the other shapes.
    A, B        the trained factors, (r, in) and (out, r).
    s           the scaling, lora_alpha / r (rsLoRA: lora_alpha / sqrt(r)).
    W'          what the layer computes with: c * (W + s * B @ A). Few variants have a scale c (out,).
                Attached adapters add the sum of w_i * s_i * B_i @ A_i (attached_factors.py); trained rows take the
                place of rows of W.
    stored      the tensors of a variant by leaf name, such as lora_A: parameters of the module, and the names in files.
                Plain LoRA stores A and B.
    effective   factors A', B' and scale c, which the stored tensors act as: A and B themselves for plain LoRA, twice
                the rank for PiSSA, whose start is subtracted again.
    block       a product left @ right, or the values of trained rows, with its row and column in a weight. What lies in
                a shard, a chunk or a slice of it is a block too.
    start       the initial values of the stored tensors (Variant.start). PiSSA and its like compute them from W.
    undo        what brings the bits of W back while W' is in its place.
    stand-in    W' in place of the parameter W, while a forward runs that is not this package's.

A layer is *factored* where its forward adds s * B(A(x)), and *merged* where W' lies in its weight.

Where to begin:

    which module gets which class           layer_kinds.py; one file a kind: linear.py, conv.py, embedding.py, ...
    how a class is swapped and put back     adapted_module.py
    where y is computed                     lora_layer.py: factored_forward and sum_forward; faster ways to the same sum
                                            in linear.py, and for GPUs in low_rank_sum.py
    what is stored, and how it acts         variant.py, lora.py; one file a variant
    where W' is written and taken back      exact_merge.py; for a layer merge_ and unmerge_ in adapted_weights.py;
                                            for a model model/merging.py
"""
