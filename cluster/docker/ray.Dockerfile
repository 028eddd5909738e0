# Image of a Ray head or worker: training, embedding, evaluation and serving. No Spark, no Java.
#
#   docker build -f cluster/docker/ray.Dockerfile -t reclora-dist-ray:0.1.0 .
#   docker build -f cluster/docker/ray.Dockerfile -t reclora-dist-ray:0.1.0-gpu \
#       --build-arg RAY_IMAGE=rayproject/ray:2.60.0-py311-gpu .
#
# Trap avoided: Ray refuses a cluster whose nodes differ in Ray's or Python's version, so the base image carries the
# Ray version of constraints.txt in its tag (a test compares them). The base is Ray's own image because KubeRay's probes
# call programs that a slim Python image lacks.
ARG RAY_IMAGE=rayproject/ray:2.60.0-py311
FROM ${RAY_IMAGE}

# Dependencies in a layer of their own: a change of our code does not install torch again.
WORKDIR /home/ray/reclora
COPY --chown=ray pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p reclora_dist spark_jobs \
    && echo '__version__ = "0"' > reclora_dist/__init__.py \
    && pip install --no-cache-dir -c constraints.txt '.[train,serve]' \
    && pip install --no-cache-dir --no-deps -c constraints.txt petastorm==0.13.1 \
    && pip uninstall --yes reclora-dist

# Editable: the configs lie beside the package, and there is one copy of both.
COPY --chown=ray . .
RUN pip install --no-cache-dir --no-deps -e .
