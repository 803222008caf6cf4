"""The words of the report that are not computed: how things were done, and why claims came out as they did."""

METHODS: dict[str, str] = {
    "verdicts": (
        "Verdicts are computed from the stored results, by Fréchet distance to the teacher. A claim holds where every "
        "comparison that can be made goes its way, and does not where one goes the other way. A comparison is decided "
        "where all within two standard errors of the difference of the logarithms agrees, with the spread between "
        "seeds pooled over the repeated cells of a method, or of all methods where it has fewer than five repeats. "
        "That something is not worse holds where it is not by more than a stated share, the two standard errors "
        "included. Where there is one run (the toy, the checkerboard) or the same students are sampled in two ways, a "
        "comparison is decided where the difference is more than a tenth, the same way for every seed. The "
        "claims are judged without a correction for their number. The two columns at the right say what the same "
        "comparisons give by other metrics. Where a claim is from: the paper's abstract or its experiments, a setting "
        "of the published recipes, the README of the authors' repository, or it is ours."
    ),
    "metrics": (
        "Samples start at the same noises with the same labels; the reference is the guided teacher (scale 2) in 64 "
        "Euler steps. Fréchet distances compare 64 features of a small classifier of the digits; their scale is their "
        "own. They can fall below the distance of two sets of the teacher's own samples because the noises are "
        "shared. Endpoint MSE is the mean squared difference of pixels in [-1, 1] from the reference's. Diversity is "
        "the mean distance of two samples of one class in feature space, divided by the teacher's: 1 is as diverse as "
        "the teacher. Accuracy is how often the classifier sees the class that was asked for. Distillation aims at "
        "the teacher, so that is what verdicts go by; the guided teacher is itself some way from the data, and "
        "students nearer to it can be further from them (see the table of all students)."
    ),
    "loop": (
        "Every student is trained by one plain loop in one process on one thread (benchmarks/paper/train.py), on "
        "the module that the ZeRO-3 trainer runs; that trainer equals a plain loop to 1e-6, which "
        "tests/training/test_recipes.py checks. The budget counts iterations and network evaluations of the "
        "student, not seconds: a GM or DX student asks the teacher at 2 states per iteration, the shortcut at 8, "
        "MeanFlow at one, with two more evaluations of the student. Data-free students walk through all segments "
        "with a batch that is smaller by their number; with one segment they are the same as those with data, whose "
        "source is pure noise too."
    ),
    "baselines": (
        "The shortcut student is the teacher's own network; its output at the source carries the state to the "
        "segment's end, regressed onto where 8 Euler steps of the teacher end. MeanFlow (arXiv 2505.13447) takes the "
        "second noise level through one more embedding, and learns from the guided teacher's velocity instead of the "
        "noisy one of single images. Its error is divided by itself, as published, and three quarters of the samples "
        "have an interval. The derivative along the flow is a central difference over 0.01 of noise level either way, "
        "not the published forward-mode product: this teacher hears its noise level in sinusoids of a thousand times "
        "it, whose ripples are, but near the image, most of its derivative by noise level. With that product the "
        "student was several times as far off in one step, also after five times the iterations. Of half and three "
        "quarters of the samples the latter came out nearer in one step; nothing else was tuned, for any method. Both "
        "are written out in benchmarks/paper/baselines.py."
    ),
    "toy": (
        "No network is trained here: the means, weights and deviation of one mixture (or a DX grid) are fitted to the "
        "teacher's velocities along one of its trajectories, then rolled out from the noise alone. The velocity error "
        "is relative to the variance of the velocities along the path; a constant velocity has 1. One trajectory, one "
        "run. `python -m benchmarks.paper.toy` does the same for an ImageNet DiT or Qwen-Image."
    ),
    "checkerboard": (
        "The teacher is exact: the velocity of a uniform density on eight squares has a closed form. The student is a "
        "small network that maps the noise to a mixture of 32 components, trained by pi-ID and evaluated once. One "
        "run, with seed 0."
    ),
    "readings": (
        "The verdicts are computed; the paragraphs below them are our reading of the numbers, and measured only "
        "where a table is named."
    ),
}

EXPLANATIONS: dict[tuple[str, str], str] = {
    ("few_steps", "holds"): (
        "A teacher's step costs two evaluations, with and without the class, a student's one. Against four times as "
        "many Euler steps it is ahead in one step, level in two and behind in four. By endpoint error the picture is "
        "less rosy (see the tables): in one step the student is ahead of two Euler steps, in two level with four, in "
        "four further off than eight. It makes samples of the right distribution, not quite the same samples."
    ),
    ("few_steps", "not decided"): ("The differences that are not decided are smaller than what seeds vary."),
    ("more_steps", "holds"): (
        "Each segment is shorter and starts at a state that the network has seen, so less is left for the policy to "
        "foresee. By distance to the data the order is the reverse (see the table), which we cannot explain: students "
        "of one step come out as near as the teacher itself, those of four as far as its 8 to 16 Euler steps."
    ),
    ("components", "not decided"): (
        "In one step, one component is worse than four: it is one x_0 for each pixel, which the state that is reached "
        "hardly changes. Four, eight and 32 cannot be told apart, and with 2 or 4 steps even one is level with them "
        "(see the tables). A pixel has one channel here, and the paper's count of components that suffice grows with "
        "channels times steps; with its 4 to 16 channels there is more for the further components to do. More of them "
        "also have more to learn in the same few iterations."
    ),
    ("components", "holds"): (
        "One component is one x_0 for each pixel, which the state that is reached hardly changes; several can lean "
        "towards the one that the state has come to suggest."
    ),
    ("components", "does not hold"): (
        "More components have more to learn in the same few iterations, and a pixel has one channel here: few are "
        "enough."
    ),
    ("gm_over_dx", "holds"): (
        "A DX policy fixes x_0 as a function of time: it runs in an open loop, and where the state has drifted, the "
        "velocity (x_t - x_0) / sigma, and with it the loss, grows as the noise level falls. A mixture looks at the "
        "state and weighs its components anew. In one step over the whole of time, where states drift most, the gap "
        "is widest. The toy below shows that this is no lack of expressiveness: along a single known trajectory DX is "
        "the better fit."
    ),
    ("shortcut", "not decided"): (
        "The direct student is nearer to the teacher's endpoints, which is just what it minimises, with four times "
        "as many teacher evaluations. But it averages where it is uncertain: its samples are less diverse within a "
        "class (see the table), which the Fréchet distance punishes about as much as the endpoints please it."
    ),
    ("shortcut", "holds"): (
        "The direct student is nearer to the teacher's endpoints, which is just what it minimises, with four times "
        "as many teacher evaluations. But it averages where it is uncertain: its samples are less diverse within a "
        "class (see the table), and by distribution it is behind."
    ),
    ("shortcut", "does not hold"): (
        "The direct student minimises the distance to the teacher's endpoints itself, asks the teacher four times "
        "as often, and is nearer to them. What it loses is diversity within a class (see the table): it averages "
        "where it is uncertain. On 8 x 8 pixels that costs less, in features of a small classifier, than it would "
        "on large images."
    ),
    ("meanflow", "holds"): (
        "MeanFlow makes its target from the derivative of what it has learnt so far, so that long intervals are "
        "learnt after short ones: at 4 NFE it is ahead of the teacher's own Euler steps, at 1 NFE far behind pi-ID. "
        "A few hundred iterations are little for it; the published runs have hundreds of thousands. This says that "
        "pi-ID learns faster, not where both end."
    ),
    ("meanflow", "not decided"): (
        "MeanFlow makes its target from the derivative of what it has learnt so far, so that long intervals are "
        "learnt after short ones: it is far behind pi-ID at 1 NFE and nears it as the steps grow. A few hundred "
        "iterations are little for it; the published runs have hundreds of thousands. This says that pi-ID learns "
        "faster, not where both end."
    ),
    ("diversity", "holds"): (
        "The L2 loss is on velocities along the student's own trajectory, of which every noise has one: nothing "
        "rewards falling back onto few samples. The teacher's own few Euler steps, the direct student, MeanFlow "
        "and, in one step, DX are all less diverse (see the tables)."
    ),
    ("diversity", "not decided"): (
        "All students of this kind are within a tenth of the teacher's diversity; the teacher's own few Euler "
        "steps, the direct student and MeanFlow are all further off (see the tables)."
    ),
    ("data_free", "holds"): (
        "Sources that the student reached itself are those it will meet at sampling, and the digits lie close to "
        "what the teacher draws. With as many network evaluations the distance to the teacher is about as small "
        "without data."
    ),
    ("data_free", "not decided"): (
        "By the means it is about as good; at 4 NFE that is decided, at 2 NFE there are too few seeds to say so. "
        "Sources that the student reached itself are those it will meet at sampling."
    ),
    ("more_steps", "not decided"): ("The differences that are not decided are smaller than what seeds vary."),
    ("dropout", "not decided"): (
        "Dropout is a regulariser of long trainings, in which components of the mixture die or are relied upon "
        "alone. In a few hundred iterations there is nothing to regularise yet, and its effect is smaller than what"
        " seeds vary."
    ),
    ("dropout", "does not hold"): (
        "Dropout is a regulariser of long trainings, in which components of the mixture die or are relied upon "
        "alone. In a few hundred iterations it only costs accuracy."
    ),
    ("dropout", "holds"): (
        "The policy that is rolled out differs from the one that is trained, so the student sees states beside its "
        "own path."
    ),
    ("window", "not decided"): (
        "A window of 3 of 128 substeps smooths a velocity that is smooth already: the teacher is small and its "
        "field gentle. The effect is smaller than what seeds vary."
    ),
    ("window", "does not hold"): (
        "A window of 3 of 128 substeps smooths a velocity that is smooth already: the teacher is small and its "
        "field gentle. It leaves less of the segment to learn from."
    ),
    ("window", "holds"): (
        "Averaging over a few substeps keeps the loss from following a policy whose velocity wavers from one "
        "substep to the next."
    ),
    ("mixing", "not decided"): (
        "The student starts with the teacher's weights and finds its own trajectory within the first hundred "
        "iterations; that the teacher leads it there changes little. The published FLUX.1 recipes use it, those "
        "for Qwen-Image and ImageNet do not."
    ),
    ("mixing", "does not hold"): (
        "The student starts with the teacher's weights and finds its own trajectory within the first hundred "
        "iterations. While the teacher leads, for two thirds of these short trainings, it learns about states that "
        "it will not meet."
    ),
    ("mixing", "holds"): (
        "States of the teacher's own trajectory are a steadier lesson as long as the student's are poor."
    ),
    ("substeps", "does not hold"): (
        "At 1 NFE quality rises with the substeps and has settled at 128. At 4 NFE it has settled too, but fewer, "
        "coarser substeps come out nearer in distribution, while the endpoint error is the same to within a few per "
        "cent: perhaps the Euler steps' own error makes up for a bias of these students. Four substeps at 4 NFE are "
        "one a segment, the direct student's way of stepping, and lose nothing here. DX needs its substeps at 4 NFE, "
        "and at 1 NFE is no better for them. That 128 are enough holds everywhere."
    ),
    ("temperature", "does not hold"): (
        "Sharpening throws away the components by which a student says that it does not know yet; what comes out is "
        "further from the teacher in both metrics, and the lower the temperature the further. A temperature is a "
        "matter of taste for images that look too soft, not of fidelity to the teacher."
    ),
    ("elastic", "does not hold"): (
        "Data-based pi-ID shows the network its sources alone: with 4 NFE these are the noise levels 1, 3/4, 1/2 "
        "and 1/4. At other levels all weights have moved and nothing has kept the network in its place. The authors "
        "say it of one adapter, GM-Qwen, a low-rank update of a large frozen base, and publish two adapters of FLUX.1 "
        "for two numbers of steps; here the number of steps at sampling should be the one of the training."
    ),
    ("toy", "holds"): (
        "With one component the path of a pixel is a straight line; from four on the path is followed to within "
        "what can be seen, and what is left sinks with the components. All rollouts end near the teacher, but by "
        "endpoint, which this verdict does not use, 32 components fitted with the same iterations end further off "
        "than four or eight. DX is better still: along one trajectory x_0 is a function of time, which is all that "
        "DX can say."
    ),
    ("checkerboard", "holds"): (
        "Here the teacher is exact and a point has two channels. One evaluation places points in the squares about "
        "as well as eight Euler steps do, and, unlike them, where the long rollout would have put them."
    ),
}
"""(claim, verdict) -> text, written with the results in view; for a verdict without a text none is given."""
