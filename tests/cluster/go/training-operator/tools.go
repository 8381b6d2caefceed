//go:build tools

// Keeps the operator's module among this module's requirements: nothing here imports it.
package tools

import _ "github.com/kubeflow/training-operator/pkg/apis/kubeflow.org/v1"
