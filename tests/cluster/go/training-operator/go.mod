module sftjob.dev/tests/cluster/training-operator

go 1.24

require github.com/kubeflow/training-operator v1.9.3

replace github.com/kubeflow/training-operator => github.com/kubeflow/trainer v1.9.3
